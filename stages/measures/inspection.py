"""A closer look at one circuit in one model: complete, minimal, faithful at which size, and fed by which layers.

Parts of the record: `completeness` (see that module), `minimality` (by elimination), `size_curve` (nodes in the order
of their scores) and `knockout` (by the central layer of the window in which one position cannot see another). All have
the four `scores`; the settings name one of them, by which heads are eliminated and the worst set is searched for.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.circuit import Group, Node
from stages.circuits.knockout import layer_windows
from stages.circuits.walker import Walker
from stages.measures.completeness import completeness, greedy_worst, random_subsets
from stages.measures.minimality import Pruning, by_elimination
from stages.measures.prepared import Prepared
from stages.measures.prompts import Prompts
from stages.measures.scores import ENDINGS, shares
from stages.measures.size_curve import areas, enough, share_of_model, sizes
from stages.pipeline.processes import in_processes
from stages.pipeline.resources import Resources

WORST = "worst_found"  # the set K that the greedy search ends with
ENOUGH = 0.9  # share of the model's accuracy from which on a circuit counts as large enough


@dataclass(frozen=True)
class Path:
    """Attention that is knocked out: what `query` reads from `keys`, in every prompt.

    Attributes:
        query: position that is blinded.
        keys: positions that it cannot see, all before it.
        every: only every so many-th prompt is run; positions before the last one cost more.
    """

    query: Int[Tensor, "n"]
    keys: Int[Tensor, "n k"]
    every: int = 1


def inspect(
    walker: Walker,
    means: Float[Tensor, "layers t h a"],
    prompts: Prompts,
    few: Prompts,
    groups: Sequence[Group],
    ranking: Sequence[Node],
    paths: Mapping[str, Path],
    settings: Any,
    generator: np.random.Generator,
    available: Resources,
) -> dict[str, Any]:
    """The record of one model.

    Args:
        walker: the model.
        means: its mean head outputs.
        prompts: prompts with answers that the circuit was not found on, best `prompts.in_tail_order`.
        few: fewer of them, for the greedy search of completeness.
        groups: of the circuit; without one, only what needs no circuit is measured.
        ranking: all nodes, strongest first; empty where there is no circuit.
        paths: of attention between positions of `prompts`, by name.
        settings: `score`, `prune_threshold`, `random_subsets`, `greedy_steps`, `knockout_window`.
        generator: of the random sets.
        available: processes, and their memory beside the model.
    """
    circuit = frozenset(node for group in groups for node in group.nodes)
    model, searched = (Prepared(walker, means, some, available.share_mib / 2) for some in (prompts, few))
    model.make_runs()

    def completeness_of_circuit() -> dict[str, Any]:
        removed: dict[str, Collection[Node]] = {group.name: frozenset(group.nodes) for group in groups}
        drawn = random_subsets(circuit, settings.random_subsets, generator)
        removed |= {f"random_{number}": nodes for number, nodes in enumerate(drawn, start=1)}
        removed[WORST] = greedy_worst(
            lambda sets: gaps(searched, circuit, sets, settings.score), circuit, settings.greedy_steps
        )
        return completeness(model, circuit, removed)

    # in an order in which two processes have about the same to do
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if circuit:
        parts["completeness"] = completeness_of_circuit
        parts["minimality"] = lambda: minimality(model, circuit, settings.score, settings.prune_threshold)
        parts["size_curve"] = lambda: size_curve(model, ranking, len(circuit))
    parts["knockout"] = lambda: knockout(model, paths, settings.knockout_window)
    found = in_processes(lambda name: parts[name](), list(parts), available.processes)
    record: dict[str, Any] = {"n": len(prompts), "completeness": None, "minimality": None, "size_curve": None}
    return record | dict(zip(parts, found, strict=True))


def minimality(model: Prepared, circuit: Collection[Node], score: str, threshold: float) -> dict[str, Any]:
    """Which heads of a circuit are missed, by one of the four scores; `trials` says with which K, and what that score
    was before and after.

    Returns:
        `size` and number of `core` heads, `stand_ins` and `idle` heads; the four scores of the circuit and of its core
        (`core_accuracy` and so on), and as `core_share` what the core has of the circuit's; one trial for each head.
    """
    found = by_elimination(
        lambda circuits: [entry[score] for entry in model.in_place(circuits).means()], circuit, circuit, threshold
    )
    whole, core = model.in_place([frozenset(circuit), found.core]).means()
    return {
        "score": score,
        "threshold": threshold,
        "size": len(found.trials),
        "core": len(found.core),
        "stand_ins": len(found.stand_ins),
        "idle": len(found.idle),
        **whole,
        **{f"core_{name}": core[name] for name in ENDINGS},
        **shares("core_share", core, whole),
        "trials": [
            {
                "head": [node.layer, node.head],
                "position": node.position,
                "verdict": _verdict(found, node),
                "removed": len(trial.removed),
                "before": trial.before,
                "after": trial.after,
            }
            for node, trial in sorted(found.trials.items())
        ],
    }


def size_curve(model: Prepared, ranking: Sequence[Node], circuit_size: int) -> dict[str, Any]:
    """Faithfulness of the k strongest nodes by k, as shares of the model's F above that of no circuit, with the areas
    CPR and CMD, and the smallest size that is enough."""
    grid = sizes(len(ranking))
    kept = model.in_place([ranking[:size] for size in grid]).means()
    full = model.full().means()[0]
    record: dict[str, Any] = {"sizes": grid, "circuit_size": circuit_size, "nodes": len(ranking)}
    for score, ending in ENDINGS.items():
        values = [entry[score] for entry in kept]
        curve = share_of_model(values, values[0], full[score])
        cpr, cmd = areas(grid, curve) if curve else (None, None)
        record |= {f"share{ending}": curve, f"cpr{ending}": cpr, f"cmd{ending}": cmd}
        record[f"enough{ending}"] = enough(grid, curve, ENOUGH) if curve else None
    return record


def knockout(model: Prepared, paths: Mapping[str, Path], width: int) -> dict[str, Any]:
    """The four scores by central layer for every path.

    Args:
        model: the model with its prompts.
        paths: by name.
        width: layers of a window.

    Returns:
        for each path the curves, and as `everywhere` what is left when all layers are blind.
    """
    n_layers = model.walker.n_layers
    windows = [*layer_windows(n_layers, width), range(n_layers)]
    record: dict[str, Any] = {"window": width, "paths": {}}
    for name, path in paths.items():
        found = model.blinded(path.query, path.keys, windows, path.every).means()
        record["paths"][name] = {
            **{score: [entry[score] for entry in found[:-1]] for score in ENDINGS},
            **{f"everywhere{ending}": found[-1][score] for score, ending in ENDINGS.items()},
        }
    return record


def gaps(model: Prepared, circuit: frozenset[Node], sets: Sequence[frozenset[Node]], score: str) -> list[float]:
    """How far apart circuit and model are in a score when each of some sets of heads is taken out of both."""
    kept, left = model.in_place([circuit - nodes for nodes in sets]).means(), model.without(sets).means()
    return [abs(a[score] - b[score]) for a, b in zip(kept, left, strict=True)]


def _verdict(found: Pruning, node: Node) -> str:
    return "core" if node in found.core else "stand-in" if node in found.stand_ins else "idle"
