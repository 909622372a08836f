"""Supervised on the base's own distribution over the valid answers: the nearest target that solves the task.

Of all distributions without an invalid answer, q(y) = p(y) [y valid] / p(valid), with p the base, is the one nearest
to the base in KL(q || p). `self_sft` draws one answer of it for each prompt; here the loss is the cross-entropy with q
itself, as from infinitely many draws.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stages.learning.probes import last_logits
from stages.learning.run import Run
from stages.learning.schedule import optimiser
from stages.learning.trainers import KeepCheckpoints, common_arguments, refuse_dropout, train_quietly


class SoftTargetTrainer(SFTTrainer):
    """SFTTrainer whose target is a distribution over the next token; the label of a prompt is its row number.

    Args:
        targets: distribution for each training row.
    """

    def __init__(self, *args: Any, targets: Float[Tensor, "n vocab"], **kwargs: Any) -> None:
        self.targets = targets
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        log_probs = (
            model(input_ids=inputs["input_ids"], logits_to_keep=1, use_cache=False).logits[:, -1].log_softmax(-1)
        )
        return -(self.targets[inputs["labels"][:, -1]] * log_probs).sum(-1).mean()


def train(run: Run) -> None:
    refuse_dropout(run.model)
    targets = restricted(last_logits(run.model, run.train.input_ids), run.train.valid)
    rows = torch.from_numpy(run.order).flatten()
    prompts = run.train.input_ids[rows]
    labels = torch.full_like(prompts, -100)
    labels[:, -1] = rows
    with tempfile.TemporaryDirectory() as folder:
        trainer = SoftTargetTrainer(
            model=run.model,
            args=SFTConfig(
                **common_arguments(run, folder),
                per_device_train_batch_size=run.training.prompts_per_step,
                max_length=None,
                packing=False,
                loss_type="nll",
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_dict({"input_ids": prompts.tolist(), "labels": labels.tolist()}),
            processing_class=run.tokenizer,
            optimizers=optimiser(run.model, run.training, run.learning_rate),
            callbacks=[KeepCheckpoints(run.recorder, completions_per_step=run.training.prompts_per_step)],
            targets=targets,
        )
        train_quietly(trainer)


def restricted(logits: Float[Tensor, "n vocab"], valid: Tensor) -> Float[Tensor, "n vocab"]:
    """The softmax of the logits over each row's valid tokens alone (`valid` is padded with -1)."""
    allowed = torch.full_like(logits, -torch.inf).scatter(1, valid.clamp(min=0), 0.0)
    # a row's padding pointed at token 0, which is valid only where the row names it
    allowed[:, 0] = torch.where((valid == 0).any(1), 0.0, -torch.inf)
    return (logits + allowed).softmax(-1)
