"""Supervised on the base's own distribution over the valid answers: the nearest target that solves the task.

Of all distributions without an invalid answer, q(y) = p(y) [y valid] / p(valid), with p the base, is the one nearest
to the base in KL(q || p). `self_sft` draws one answer of it for each prompt; here the loss is the cross-entropy with q
itself, as from infinitely many draws.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from stages.learning import supervised
from stages.learning.answers import used_rows, valid_logits
from stages.learning.run import Run


def train(run: Run) -> None:
    supervised.refuse_several_tokens(run)
    supervised.fit_soft(run, run.train.valid.clamp(min=0), restricted(run))


def restricted(run: Run) -> Float[Tensor, "n v"]:
    """Each row's softmax over its valid answers alone; 0 in rows that the run does not use."""
    rows = used_rows(run)
    targets = torch.zeros(run.train.valid.shape)
    targets[rows] = valid_logits(run, rows).softmax(-1)
    return targets
