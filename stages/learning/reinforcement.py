"""Reinforcement learning on sampled answers: TRL's GRPOTrainer, with one forward pass per prompt where that is exact.

GRPOTrainer generates and scores every completion on its own: 64 prompts x 8 one-token completions are 512
    sequences through the model, twice. All completions of a prompt share one distribution over the answer
    token, so where answers are one token a step is:

1. one forward pass over the different prompts gives that distribution (with its graph);
2. all completions are drawn from it (`rollout_func`);
3. TRL scores them and forms advantages, unchanged;
4. the loss takes its log-probabilities from the pass of step 1 (`_get_per_token_logps_and_entropies`).

Exact as long as prompts have equal length, completions one token, and no dropout is active. Answers of several tokens
are generated and scored by TRL, up to their stop token. The tests compare the two on identical samples.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from stages.learning.rewards import Reward
from stages.learning.run import Run
from stages.learning.schedule import optimiser
from stages.learning.trainers import KeepCheckpoints, common_arguments, refuse_dropout, train_quietly


class AnswersTrainer(GRPOTrainer):
    """GRPOTrainer whose prompts are token ids, named by their row number in `prompt_ids`.

    Args:
        prompt_ids: token ids of all training rows.
        generator: source of the samples.
        baseline: subtract the mean reward of the prompt's completions, or use the raw reward.
        stop: token that ends a completion; None: those that the model's own texts end with.
    """

    def __init__(
        self,
        *args: Any,
        prompt_ids: Int[Tensor, "n t"],
        generator: torch.Generator,
        baseline: bool,
        stop: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.prompt_ids, self.generator, self.baseline = prompt_ids, generator, baseline
        self._rewards = torch.empty(0)
        super().__init__(*args, **kwargs)
        if stop is not None:
            # where a completion is cut; the end of a text is an ordinary wrong token here, as it is for the probes
            self.eos_token_ids = [stop]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.prompt_ids[[int(row) for row in prompts]].tolist(), None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL samples with torch's global generator; here it starts from this arm's own draws."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=self.generator)))
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if not self.baseline:
            batch["advantages"] = self._rewards.sum(-1)
        return batch


class OneTokenTrainer(AnswersTrainer):
    """The same for answers of one token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pass: tuple[Tensor, Tensor] | None = None  # prompts and log-probabilities of the sampling pass
        super().__init__(*args, rollout_func=_roll_out, **kwargs)

    def answer_log_probs(self, model: Any, prompts: Int[Tensor, "n t"]) -> Float[Tensor, "n vocab"]:
        """Log-probabilities of the answer token, at the temperature of the samples."""
        return (
            model(input_ids=prompts, logits_to_keep=1, use_cache=False).logits[:, -1] / self.temperature
        ).log_softmax(-1)

    def sample(self, rows: Int[Tensor, "n"]) -> Int[Tensor, "n 1"]:
        """One answer for each row, repeated rows independently, drawn on the CPU; keeps the pass for the loss."""
        prompts, inverse = self.prompt_ids[rows].unique(dim=0, return_inverse=True)
        prompts = prompts.to(self.accelerator.device)
        log_probs = self.answer_log_probs(self.model, prompts)
        self._pass = (prompts, log_probs)
        return torch.multinomial(log_probs.detach().cpu().exp()[inverse], 1, generator=self.generator)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        prompts, inverse = input_ids[:, :-1].unique(dim=0, return_inverse=True)
        kept, log_probs = self._pass, None
        if kept is not None and torch.is_grad_enabled():  # without gradients it is a reference model that is asked
            self._pass = None  # it serves one loss only: its graph goes with the backward pass
            sampled_prompts, log_probs = kept
            if not torch.equal(sampled_prompts, prompts):
                raise RuntimeError("the loss was asked for other prompts than were sampled from")
        if log_probs is None:
            log_probs = self.answer_log_probs(model, prompts)
        entropies = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
        return log_probs[inverse].gather(1, input_ids[:, -1:]), entropies[inverse, None], None


def _roll_out(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
    """TRL's hook for samples: `prompts` are row numbers, each repeated once per completion."""
    assert isinstance(trainer, OneTokenTrainer)
    rows = torch.tensor([int(row) for row in prompts])
    answers = trainer.sample(rows)
    return {
        "prompt_ids": trainer.prompt_ids[rows].tolist(),
        "completion_ids": answers.tolist(),
        "logprobs": None,
    }


def grpo_arguments(section: Any, prompts_per_step: int, length: int = 1, stop: int | None = None) -> dict[str, Any]:
    """Arguments of GRPOConfig that say what is learned, and how.

    Args:
        section: settings of an arm (`PolicyGradient`). One without `scale_rewards` or `beta` divides rewards by
            nothing and has no reference model.
        prompts_per_step: different ones.
        length: most tokens of a completion.
        stop: token that ends a completion; None: those that the model's own texts end with.
    """
    return {
        "per_device_train_batch_size": section.samples_per_prompt * prompts_per_step,  # TRL counts completions
        "num_generations": section.samples_per_prompt,
        "num_iterations": section.num_iterations,
        "epsilon": section.epsilon,
        "max_completion_length": length,
        "temperature": section.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "loss_type": section.loss_type,
        "scale_rewards": getattr(section, "scale_rewards", "none"),
        "beta": getattr(section, "beta", 0.0),
        "mask_truncated_completions": False,
        "generation_kwargs": None if stop is None else {"eos_token_id": [stop]},
    }


def fit(run: Run, reward: Reward, baseline: bool = True, one_pass: bool = True) -> None:
    """Train `run.model` by policy gradient on samples of each batch of prompts, with the settings of `run.section`.

    The loss of a token is -advantage * its probability / that when it was drawn, the ratio clipped (Schulman et al.
    2017, arXiv 1707.06347); see `PolicyGradient` for what the sum is divided by. With one iteration that is the policy
    gradient alone. Advantage = reward minus the mean of its group, divided by nothing (Dr. GRPO, Liu et al. 2025, arXiv
    2503.20783) or by a standard deviation (GRPO, Shao et al. 2024, arXiv 2402.03300), or the raw reward without
    `baseline` (REINFORCE, Williams 1992). With several iterations each batch of prompts serves so many steps in turn,
    and fewer batches are used. With `beta` above 0 the base is loaded a second time.

    Args:
        reward: see `rewards`.
        baseline: subtract the mean reward of the prompt's completions.
        one_pass: where answers are one token, pass each prompt through the model once; False: as TRL does.
    """
    refuse_dropout(run.model)
    prompts, stop = run.train, run.train.stop
    length = prompts.valid.shape[-1] if prompts.several_tokens else 1
    trainer_class = OneTokenTrainer if one_pass and not prompts.several_tokens else AnswersTrainer
    completions = run.section.samples_per_prompt * run.training.prompts_per_step
    arguments = grpo_arguments(run.section, run.training.prompts_per_step, length, stop)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=run.model,
            reward_funcs=reward,
            args=GRPOConfig(**common_arguments(run, folder), **arguments),
            train_dataset=Dataset.from_dict({"prompt": [str(row) for row in run.order.flatten()]}),
            processing_class=run.tokenizer,
            optimizers=optimiser(run.model, run.training, run.learning_rate),
            callbacks=[KeepCheckpoints(run.watcher, completions, run.section.num_iterations)],
            prompt_ids=prompts.input_ids,
            generator=run.draw("samples"),
            baseline=baseline,
            stop=stop,
        )
        train_quietly(trainer)
