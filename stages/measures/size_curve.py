"""Faithfulness against size: how good are the k best (head, position) nodes, and how soon?

1. All nodes of a model are ranked by their scores; C_k are the first k.
2. f(k) = (F(C_k) - F(none)) / (F(M) - F(none)), with everything outside C_k mean-ablated and M the whole model.
3. Two areas sum the curve up over the share x = k / N of all N nodes (Mueller et al., MIB, ICML 2025, section 3):
   CPR, the integral of f, is high where few nodes do the task (a circuit may overshoot 1);
   CMD, the integral of |1 - f|, is 0 where circuits of every size behave as the model does.
MIB measures circuits of edges at shares from 0.1 % to 100 % and lets F(C_N) be F(M). Here nodes are counted, heads
at the positions that have names; all heads stay mean-ablated elsewhere, so f(N) is measured, too, and need not be 1.
The areas are trapezoids over a grid that is dense for small circuits.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from stages.circuits.circuit import Node


def ranked_nodes(strengths: Mapping[str, Float[np.ndarray, "layers h"]]) -> list[Node]:
    """Nodes from the strongest to the weakest; ties stand in the order of position, layer and head.

    Args:
        strengths: position -> strength of each head there, minus infinity where none is known.
    """
    nodes = [
        (-float(values[layer, head]), position, layer, head)
        for position, values in strengths.items()
        for layer in range(values.shape[0])
        for head in range(values.shape[1])
    ]
    return [Node(layer, head, position) for _, position, layer, head in sorted(nodes)]


def sizes(total: int) -> list[int]:
    """0, 1, 2, ... with steps that grow by about a quarter of the size, and the total."""
    grid, size = [], 0
    while size < total:
        grid.append(size)
        size += max(1, size // 4)
    return [*grid, total]


def share_of_model(values: Sequence[float], none: float, full: float) -> list[float] | None:
    """f of each value; None where the whole model is no better than no circuit at all."""
    return [(value - none) / (full - none) for value in values] if full > none else None


def areas(grid: Sequence[int], shares: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD of a curve f over sizes from 0 to the number of all nodes."""
    x, f = np.asarray(grid, float) / grid[-1], np.asarray(shares, float)
    return float(np.trapezoid(f, x)), float(np.trapezoid(np.abs(1 - f), x))


def enough(grid: Sequence[int], shares: Sequence[float], share: float) -> int | None:
    """The smallest size of the grid from which on every circuit up to twice as large has at least this share.

    One lucky circuit between two bad ones does not count.
    """
    for size in grid:
        if all(f >= share for other, f in zip(grid, shares, strict=True) if size <= other <= 2 * size):
            return size
    return None
