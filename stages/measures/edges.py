"""How much single edges changed: a sending head's effect on the receivers of a hop, base against tuned.

The change d = e_tuned - e_base is known with noise, and squaring noise adds to it. The noise of the two halves of the
examples is independent, so the product of d on one half with d on the other has the right mean:
||d||^2 is estimated by <d_even, d_odd>, and ||e_base||^2 by <b_even, b_odd> (the cross-validated distance; Walther et
al., NeuroImage 2016, section 2). An estimate below 0 is written as 0: no change beyond the noise.

Strong edges do at least `strong` (absolute, in the unit of the metric) in the base. Of them are counted those whose
sign flipped, and those that kept it but fell under half; and, as new, edges that are strong in the tuned model and were
under half of it, or of the other sign, in the base. All three are counted across halves, and for the two halves of
the base (`*_noise`), which is what noise alone does.
"""

from functools import partial
from math import sqrt

import numpy as np

from stages.measures.edge_scores import Both, EdgeScores, Vector, crossed, within


def edge_changes(base: EdgeScores, tuned: EdgeScores, strong: float) -> dict[str, dict[str, float | None]]:
    """Of all hops "together", and of each hop."""
    entries = {"together": _entry(base.edges(), tuned.edges(), strong)}
    return entries | {hop: _entry(base.edges(hop), tuned.edges(hop), strong) for hop in base.hops}


def _entry(base: Both, tuned: Both, strong: float) -> dict[str, float | None]:
    size = _product(base, base)
    delta = tuned - base
    both = base.mean(0), tuned.mean(0)
    raw = float(np.linalg.norm(both[1] - both[0]) / np.linalg.norm(both[0])) if np.any(both[0]) else None
    counts = {"flipped": flipped, "weakened": weakened, "new": new}
    return {
        "change": sqrt(max(0.0, _product(delta, delta)) / size) if size > 0 else None,
        "change_raw": raw,
        "size_ratio": sqrt(max(0.0, _product(tuned, tuned)) / size) if size > 0 else None,
        "strong": float(np.mean([np.sum(np.abs(half) >= strong) for half in base])),
        **{name: crossed(partial(share, strong=strong), base, tuned) for name, share in counts.items()},
        **{f"{name}_noise": within(partial(share, strong=strong), base) for name, share in counts.items()},
    }


def flipped(before: Vector, after: Vector, strong: float) -> float | None:
    """Share of the strong edges that have the other sign."""
    mask = np.abs(before) >= strong
    return float(np.mean(before[mask] * after[mask] < 0)) if mask.any() else None


def weakened(before: Vector, after: Vector, strong: float) -> float | None:
    """Share of the strong edges that have the same sign and less than half of the effect, or none."""
    mask = np.abs(before) >= strong
    same = before[mask] * after[mask] >= 0
    return float(np.mean(same & (np.abs(after[mask]) < np.abs(before[mask]) / 2))) if mask.any() else None


def new(before: Vector, after: Vector, strong: float) -> float | None:
    """Edges that are strong only now, as a share of the edges that are strong now."""
    mask = np.abs(after) >= strong
    weak = (np.abs(before[mask]) < np.abs(after[mask]) / 2) | (before[mask] * after[mask] < 0)
    return float(np.mean(weak)) if mask.any() else None


def _product(x: Both, y: Both) -> float:
    return float(x[0] @ y[1] + x[1] @ y[0]) / 2
