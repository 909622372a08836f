"""How alike the old task's edges are in two models: cosine and correlations of signed path-patching effects.

- value: across halves of the examples (see `edge_scores`);
- ceiling: what two models with the same true effects would have, the geometric mean of their similarities with
  themselves across halves (Spearman 1904, correction for attenuation). All are of halves, so no correction for their
  length is due;
- null: the tuned model's heads under other names: the heads of every layer are permuted, with the same permutation in
  all hops. It keeps how much each layer does, and how the effects are spread.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import stats

from stages.measures.edge_scores import Both, Compare, EdgeScores, Vector, crossed, within

NULL_QUANTILE = 0.95


def cosine(x: Vector, y: Vector) -> float | None:
    """Cosine of the angle between two vectors; None where one is 0."""
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size > 0 else None


def pearson(x: Vector, y: Vector) -> float | None:
    """Correlation; None where a vector is constant or has fewer than three entries."""
    return float(np.corrcoef(x, y)[0, 1]) if _vary(x, y) else None


def spearman(x: Vector, y: Vector) -> float | None:
    """Rank correlation; None as for `pearson`. It weighs the many edges that do next to nothing like the few that
    count, so its ceiling is far lower."""
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]) if _vary(x, y) else None


# name -> the measure, and what vectors become before their cosine is the same number
KINDS: dict[str, tuple[Compare, Callable[[np.ndarray], np.ndarray]]] = {
    "cosine": (cosine, lambda x: x),
    "pearson": (pearson, lambda x: x - x.mean(-1, keepdims=True)),
    "spearman": (spearman, lambda x: (lambda r: r - r.mean(-1, keepdims=True))(stats.rankdata(x, axis=-1))),
}


def similarity(base: EdgeScores, tuned: EdgeScores, permutations: int, seed: list[int]) -> dict[str, Any]:
    """Of all hops together, and of each.

    Args:
        base, tuned: the same hops.
        permutations: draws of the null.
        seed: of the draws.

    Returns:
        "together" and "hops" (name -> the same): kind -> value, ceiling, that of base and tuned alone, mean and
        upper quantile of the null. None where undefined.
    """
    layers, heads = base.live.shape[1:]
    order = np.broadcast_to(np.arange(heads), (permutations, layers, heads))
    order = np.random.default_rng(seed).permuted(order, axis=-1)
    return {
        "together": _entry(base, tuned, None, order),
        "hops": {hop: _entry(base, tuned, hop, order) for hop in base.hops},
    }


def floor(one: EdgeScores, other: EdgeScores) -> dict[str, float | None] | None:
    """The similarity of two models that were trained from different weights, by kind: heads of the same layer have
    nothing but their number in common. None where they share no hop."""
    pair = one.matched(other)
    if pair is None:
        return None
    edges = [scores.edges() for scores in pair]
    return {kind: crossed(compare, *edges) for kind, (compare, _) in KINDS.items()}


def _entry(
    base: EdgeScores, tuned: EdgeScores, hop: str | None, order: Int[np.ndarray, "r layers h"]
) -> dict[str, dict[str, float | None]]:
    ours, theirs = base.edges(hop), tuned.edges(hop)
    # entry -> where its value comes from when heads are renamed, among the live edges
    live = base.live if hop is None else base.live & (np.array(base.hops) == hop)[:, None, None]
    place = np.full(live.shape, -1)
    place[live] = np.arange(live.sum())
    renamed = np.take_along_axis(place[None], order[:, None], axis=-1)[:, live]
    entry = {}
    for kind, (compare, prepare) in KINDS.items():
        ceilings = within(compare, ours), within(compare, theirs)
        null = _null(prepare, ours, theirs, renamed)
        both = None if None in ceilings else max(0.0, ceilings[0] or 0.0) * max(0.0, ceilings[1] or 0.0)
        entry[kind] = {
            "value": crossed(compare, ours, theirs),
            "ceiling": None if both is None else sqrt(both),
            "ceiling_base": ceilings[0],
            "ceiling_tuned": ceilings[1],
            "null_mean": None if null is None else float(null.mean()),
            "null_high": None if null is None else float(np.quantile(null, NULL_QUANTILE)),
        }
    return entry


def _null(prepare: Callable[[np.ndarray], np.ndarray], ours: Both, theirs: Both, renamed: Any) -> np.ndarray | None:
    """`crossed` of every renaming; None where undefined."""
    x, y = prepare(ours), prepare(theirs)
    sizes = [np.linalg.norm(side, axis=-1, keepdims=True) for side in (x, y)]
    if min(size.min() for size in sizes) == 0:
        return None
    x, y = x / sizes[0], y / sizes[1]
    return (y[1][renamed] @ x[0] + y[0][renamed] @ x[1]) / 2


def _vary(x: Vector, y: Vector) -> bool:
    return len(x) > 2 and float(np.ptp(x)) > 0 and float(np.ptp(y)) > 0
