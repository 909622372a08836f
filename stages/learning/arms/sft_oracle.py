"""Supervised on the base's own distribution over the valid answers: the nearest target that solves the task.

Of all distributions without an invalid answer, q(y) = p(y) [y valid] / p(valid), with p the base, is the one nearest
to the base in KL(q || p). `self_sft` draws one answer of it for each prompt; here the loss is the cross-entropy with q
itself, as from infinitely many draws.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from stages.learning import supervised
from stages.learning.probes import last_logits
from stages.learning.run import Run


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
    targets = restricted(last_logits(run.model, run.train.input_ids), run.train.valid)
    rows = torch.from_numpy(run.order)
    supervised.fit_sequences(run, run.train.input_ids[rows], rows, SoftTargetTrainer, targets=targets)


def restricted(logits: Float[Tensor, "n vocab"], valid: Tensor) -> Float[Tensor, "n vocab"]:
    """The softmax of the logits over each row's valid tokens alone (`valid` is padded with -1)."""
    allowed = torch.full_like(logits, -torch.inf).scatter(1, valid.clamp(min=0), 0.0)
    # a row's padding pointed at token 0, which is valid only where the row names it
    allowed[:, 0] = torch.where((valid == 0).any(1), 0.0, -torch.inf)
    return (logits + allowed).softmax(-1)
