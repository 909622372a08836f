"""Which nodes are the strongest in both models, as a curve over their number k.

A node is a head at a position; its strength is its largest absolute effect in any hop there. Let A be the k strongest
of one model and B those of another, on the other half of the examples (see `edge_scores`). A node without any effect
(strength 0) is not among the strongest: which of many such nodes came first would say nothing, and be the same in all
models. So A has fewer than k nodes where fewer do anything.

- share: |A and B| / max(|A|, |B|), what is kept of the base's k strongest nodes; jaccard: |A and B| / |A or B|;
- chance: what random sets of these sizes of all N nodes have; |A and B| is hypergeometric, so of two sets of k nodes
  the share is k / N on average;
- layered: what random sets have that hold as many nodes of every layer at every position as A and B do. This is the
  stricter floor, since which layers do the work is half of the answer. Inside a layer of H nodes of which a and b are
  chosen the overlap is again hypergeometric, a b / H on average; the sum over layers is an exact convolution;
- corrected: (share - layered) / (1 - layered), 0 by chance and 1 for the same set, as Cohen's kappa.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from stages.circuits.circuit import Circuit, Node
from stages.measures.edge_scores import Both, EdgeScores, Vector, mean
from stages.measures.size_curve import sizes
from stages.pipeline.stage import Invalid

SCORES = ("share", "jaccard", "chance", "chance_jaccard", "layered", "layered_jaccard", "corrected")


def strengths(scores: EdgeScores) -> tuple[Both, Int[np.ndarray, " m"]]:
    """Strength of every node that can do something, on each half, and the number of its layer and position."""
    layers, heads = scores.live.shape[1:]
    values, strata = [], []
    for number, position in enumerate(dict.fromkeys(scores.positions)):
        here = [index for index, name in enumerate(scores.positions) if name == position]
        live = scores.live[here].any(0)
        values.append(np.abs(scores.halves[:, here]).max(1)[:, live])
        strata.append(np.repeat(np.arange(layers) + number * layers, heads).reshape(layers, heads)[live])
    return np.concatenate(values, axis=1), np.concatenate(strata)


def overlap_at(one: Vector, other: Vector, strata: Int[np.ndarray, " m"], k: int) -> dict[str, float | None]:
    """All scores of the k strongest nodes of each; `corrected` is None where chance reaches 1, all are where no node
    does anything in either."""
    chosen = [{i for i in np.argsort(-values, kind="stable")[:k].tolist() if values[i] != 0} for values in (one, other)]
    counts = len(chosen[0]), len(chosen[1])
    if counts == (0, 0):
        return dict.fromkeys(SCORES)
    common = len(chosen[0] & chosen[1])
    uniform = _hypergeometric(len(one), *counts)
    layered = np.ones(1)
    for stratum in np.unique(strata):
        inside = set(np.flatnonzero(strata == stratum).tolist())
        layered = np.convolve(layered, _hypergeometric(len(inside), *(len(inside & nodes) for nodes in chosen)))
    share, floor = common / max(counts), _expected(layered, *counts)[0]
    return dict(
        zip(
            SCORES,
            (
                share,
                common / (sum(counts) - common),
                *_expected(uniform, *counts),
                *_expected(layered, *counts),
                (share - floor) / (1 - floor) if floor < 1 - 1e-12 else None,
            ),
            strict=True,
        )
    )


def circuit_overlap(one: Circuit, other: Circuit) -> dict[str, float | None]:
    """How many heads at positions two circuits of models of one size share, with what they would by chance: `SCORES`,
    the nodes of each, and of both.

    Raises:
        Invalid: the models differ in layers or heads.
    """
    shapes = [(circuit.n_layers, circuit.n_heads) for circuit in (one, other)]
    if shapes[0] != shapes[1]:
        raise Invalid(f"circuits of models with {shapes[0]} and {shapes[1]} layers and heads: must be the same")
    layers, heads = shapes[0]
    nodes = [set(circuit.nodes) for circuit in (one, other)]
    positions = sorted({node.position for each in nodes for node in each})
    every = [Node(layer, head, position) for position in positions for layer in range(layers) for head in range(heads)]
    chosen = [np.array([float(node in each) for node in every]) for each in nodes]
    found = overlap_at(chosen[0], chosen[1], np.arange(len(every)) // heads, max(map(len, nodes)))
    return found | {"one": len(nodes[0]), "other": len(nodes[1]), "both": len(nodes[0] & nodes[1])}


def overlap_curve(one: EdgeScores, other: EdgeScores, grid: Sequence[int]) -> dict[str, list[float | None]]:
    """Scores of two models with the same hops at every k, across halves; of one with itself if it is given twice."""
    (ours, strata), (theirs, _) = strengths(one), strengths(other)
    curve: dict[str, list[float | None]] = {name: [] for name in SCORES}
    for k in grid:
        both = [overlap_at(x, y, strata, k) for x, y in ((ours[0], theirs[1]), (ours[1], theirs[0]))]
        for name in SCORES:
            curve[name].append(mean([scores[name] for scores in both]))
    return curve


def overlaps(base: EdgeScores, tuned: EdgeScores, circuit_size: int) -> dict[str, Any]:
    """Observed, ceiling (mean of each model with itself) and chance over the sizes, and at the size of the circuit.

    Returns:
        nodes: N; sizes: the k; observed, ceiling: name of the score -> one value for each k; at_circuit: the same at
        one k, the size of the base's circuit (of N nodes at most N - 1).
    """
    grid = node_grid(base)
    nodes = strengths(base)[0].shape[1]
    at = min(max(1, circuit_size), nodes - 1)
    points = [*grid, at]
    observed, *selves = (overlap_curve(*pair, points) for pair in ((base, tuned), (base, base), (tuned, tuned)))
    ceiling = {name: [mean([curve[name][i] for curve in selves]) for i in range(len(points))] for name in SCORES}
    return {
        "nodes": nodes,
        "sizes": grid,
        "observed": {name: values[:-1] for name, values in observed.items()},
        "ceiling": {name: ceiling[name][:-1] for name in ("share", "jaccard", "corrected")},
        "at_circuit": {"size": at}
        | {name: values[-1] for name, values in observed.items()}
        | {f"ceiling_{name}": ceiling[name][-1] for name in ("share", "jaccard", "corrected")},
    }


def node_grid(scores: EdgeScores) -> list[int]:
    """Sizes from 1 to less than all nodes, where every overlap is 1."""
    return sizes(strengths(scores)[0].shape[1])[1:-1]


@cache
def _hypergeometric(total: int, first: int, second: int) -> Float[np.ndarray, " o"]:
    """Probability of each overlap 0, 1, ... of two random sets of these sizes among so many nodes."""
    return stats.hypergeom.pmf(np.arange(min(first, second) + 1), total, first, second)


def _expected(overlap: Float[np.ndarray, " o"], first: int, second: int) -> tuple[float, float]:
    """Mean share and mean Jaccard index of sets of these sizes whose overlap is so distributed."""
    common = np.arange(len(overlap))
    return float(overlap @ common) / max(first, second), float(overlap @ (common / (first + second - common)))
