"""Reinforcement learning on one answer token: TRL's GRPOTrainer with one forward pass per prompt.

GRPOTrainer generates and scores every completion on its own: 64 prompts x 8 one-token completions are 512
    sequences through the model, twice. All completions of a prompt share one distribution over the answer
    token, so here a step is:

1. one forward pass over the different prompts gives that distribution (with its graph);
2. all completions are drawn from it (`rollout_func`);
3. TRL scores them and forms advantages, unchanged;
4. the loss takes its log-probabilities from the pass of step 1 (`_get_per_token_logps_and_entropies`).

Exact as long as prompts have equal length, completions one token, and no dropout is active. The tests compare
it with the plain trainer on identical samples.
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


class OneTokenTrainer(GRPOTrainer):
    """GRPOTrainer for one-token answers; prompts are named by their row number in `prompt_ids`.

    Args:
        prompt_ids: token ids of all training rows.
        generator: source of the samples.
        baseline: subtract the mean reward of the prompt's completions (GRPO), or use the raw reward
            (REINFORCE).
    """

    def __init__(
        self,
        *args: Any,
        prompt_ids: Int[Tensor, "n t"],
        generator: torch.Generator,
        baseline: bool,
        **kwargs: Any,
    ) -> None:
        self.prompt_ids, self.generator, self.baseline = prompt_ids, generator, baseline
        self._pass: tuple[Tensor, Tensor] | None = None  # prompts and log-probabilities of the sampling pass
        self._rewards = torch.empty(0)
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

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if not self.baseline:
            batch["advantages"] = self._rewards.sum(-1)
        return batch


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


def grpo_arguments(samples_per_prompt: int, prompts_per_step: int, temperature: float, beta: float) -> dict[str, Any]:
    """Arguments of GRPOConfig for the policy gradient without any of its later additions (see `fit`)."""
    return {
        "per_device_train_batch_size": samples_per_prompt * prompts_per_step,  # TRL counts completions
        "num_generations": samples_per_prompt,
        "num_iterations": 1,
        "max_completion_length": 1,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "beta": beta,
        "mask_truncated_completions": False,
    }


def fit(
    run: Run, reward: Reward, baseline: bool, samples_per_prompt: int, temperature: float, beta: float = 0.0
) -> None:
    """Train `run.model` by policy gradient: one gradient step on each batch of fresh samples.

    The loss is that of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): the mean over completions of -advantage
    * log p, advantage = reward minus the mean of its group, or the raw reward without `baseline` (REINFORCE,
    Williams 1992).

    Args:
        reward: see `rewards`.
        samples_per_prompt: completions drawn for each prompt, at least 2.
        temperature: of samples and loss; 1 is on-policy.
        beta: weight of KL(policy || base); above 0 the base is loaded a second time.
    """
    refuse_dropout(run.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = OneTokenTrainer(
            model=run.model,
            reward_funcs=reward,
            args=GRPOConfig(
                **common_arguments(run, folder),
                **grpo_arguments(samples_per_prompt, run.training.prompts_per_step, temperature, beta),
            ),
            train_dataset=Dataset.from_dict({"prompt": [str(row) for row in run.order.flatten()]}),
            processing_class=run.tokenizer,
            optimizers=optimiser(run.model, run.training, run.learning_rate),
            callbacks=[KeepCheckpoints(run.recorder, samples_per_prompt * run.training.prompts_per_step)],
            prompt_ids=run.train.input_ids,
            generator=run.draw("samples"),
            baseline=baseline,
        )
        train_quietly(trainer)
