"""Are the inner representations of two models the same up to rotation and scale? Linear CKA, layer by layer.

CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T, L = Y Y^T of the same examples (Kornblith et al., ICML
2019, section 3). HSIC is the unbiased estimate of Song et al. (JMLR 2012, theorem 5; for CKA Nguyen et al., ICLR 2021),
so unrelated representations have 0 on average; the plain one has more the fewer examples there are for each dimension.
It is computed from the features, without n x n matrices. 1 = the same up to rotation, scale and offset.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.budget import MIB, making_bytes, rows_that_fit
from stages.circuits.walker import Walker


def linear_cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n c"]) -> float | None:
    """Unbiased linear CKA of the same examples' features, in float64; may be slightly below 0.

    Returns:
        None with fewer than four examples, or where features do not vary (or vary less than by chance).
    """
    if len(x) < 4:
        return None
    x, y = (features.double() - features.double().mean(0) for features in (x, y))  # the offset changes nothing
    own = hsic(x, x), hsic(y, y)
    return hsic(x, y) / (own[0] * own[1]) ** 0.5 if min(own) > 0 else None


def hsic(x: Float[Tensor, "n d"], y: Float[Tensor, "n c"]) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of linear kernels; n at least 4."""
    n = len(x)
    own = x.square().sum(1), y.square().sum(1)  # diagonals, which the estimate leaves out
    rows = [features @ features.sum(0) - diagonal for features, diagonal in zip((x, y), own, strict=True)]
    trace = (x.T @ y).square().sum() - own[0] @ own[1]
    sums = rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2))
    return float((trace + sums - 2 / (n - 2) * (rows[0] @ rows[1])) / (n * (n - 3)))


@torch.no_grad()
def last_streams(
    walker: Walker, input_ids: Int[Tensor, "n t"], batch: int = 32, memory_mib: float = 1024.0
) -> Float[Tensor, "layers n d"]:
    """The residual stream at the last token after each layer, of so many prompts at once, or as many as fit."""
    size = min(batch, rows_that_fit(walker, making_bytes(walker, input_ids.shape[1], ("residual",)), memory_mib * MIB))
    parts = input_ids.to(walker.device).split(size)
    return torch.cat([walker.run(rows, keep=("residual",)).residual[1:, :, -1].cpu().clone() for rows in parts], dim=1)


def layer_cka(base: Float[Tensor, "layers n d"], tuned: Float[Tensor, "layers n d"]) -> dict[str, object]:
    """CKA after each layer, and its mean over the layers where it is defined."""
    layers = [linear_cka(x, y) for x, y in zip(base, tuned, strict=True)]
    defined = [value for value in layers if value is not None]
    return {"layers": layers, "mean": sum(defined) / len(defined) if defined else None}
