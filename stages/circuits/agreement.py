"""Do two runs of the same experiment rank the heads alike? For scores in bfloat16 against float32, or of two seeds.

Heads whose effect is exactly 0 in both (those above the highest receiver) say nothing about agreement and are left
out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from stages.circuits.checks import check_finite
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class Agreement:
    """How alike two rankings are.

    Attributes:
        n: heads that were compared.
        spearman: rank correlation over them, from -1 to 1; None when either has fewer than two different scores.
        top: k -> share of the k strongest heads of one that are among the k strongest of the other; for k <= n.
        chance: k -> that share between random rankings, k / n.
        largest_difference: largest absolute difference of two scores, in their unit.
    """

    n: int
    spearman: float | None
    top: dict[int, float]
    chance: dict[int, float]
    largest_difference: float


def agreement(
    reference: Float[Tensor, "layers h"], other: Float[Tensor, "layers h"], sizes: tuple[int, ...] = (5, 10, 20)
) -> Agreement:
    """Agreement of two sets of head scores, stronger meaning larger.

    Args:
        reference: for example the strengths in float32.
        other: the same in another precision.
        sizes: numbers k of strongest heads.

    Raises:
        Invalid: the shapes differ, or a score is not a finite number.
    """
    if reference.shape != other.shape:
        raise Invalid(f"scores have shapes {list(reference.shape)} and {list(other.shape)}: must be the same")
    live = _live(reference, other)
    a, b = reference[live].double(), other[live].double()
    check_finite(a, "a reference score")
    check_finite(b, "a score")
    n = len(a)
    varied = n > 1 and bool((a != a[0]).any()) and bool((b != b[0]).any())
    ranks = torch.stack([torch.from_numpy(rankdata(scores.numpy())) for scores in (a, b)])  # ties share their mean rank
    spearman = float(torch.corrcoef(ranks)[0, 1]) if varied else None
    top = {k: len(_strongest(a, k) & _strongest(b, k)) / k for k in sizes if 0 < k <= n}
    return Agreement(n, spearman, top, {k: k / n for k in top}, float((a - b).abs().max()) if n else 0.0)


def _live(reference: Tensor, other: Tensor) -> Bool[Tensor, "layers h"]:
    return (reference != 0) | (other != 0)


def _strongest(scores: Float[Tensor, " n"], k: int) -> set[int]:
    return set(scores.argsort(descending=True, stable=True)[:k].tolist())
