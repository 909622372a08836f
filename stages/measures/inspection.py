"""A closer look at one circuit in one model: complete, minimal, faithful at which size, and fed by which layers.

Parts of the record: `completeness` (see that module), `minimality` (by elimination, F is the accuracy and, beside it,
the logit difference), `size_curve` (nodes in the order of their scores) and `knockout` (accuracy and logit difference
by the central layer of the window in which one position cannot see another).
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.circuit import Group, Node
from stages.circuits.knockout import knocked_out, layer_windows
from stages.circuits.walker import Walker
from stages.measures.completeness import completeness, greedy_worst, random_subsets
from stages.measures.faithfulness import Readout, in_tail_order
from stages.measures.minimality import Pruning, by_elimination
from stages.measures.prepared import Prepared
from stages.measures.size_curve import areas, enough, share_of_model, sizes
from stages.pipeline.processes import in_processes
from stages.tasks.examples import CLAUSE_POSITIONS, POSITIONS, Examples

OTHER_CLAUSE = "another_clause"  # the control: all named positions of a clause that was not asked for
FEWER = 4  # knockouts at positions before the last one, which cost more, take every so many-th example
WORST = "worst_found"  # the set K that the greedy search ends with
ENOUGH = 0.9  # share of the model's accuracy from which on a circuit counts as large enough


def inspect(
    walker: Walker,
    means: Float[Tensor, "layers t h a"],
    examples: Examples,
    groups: Sequence[Group],
    ranking: Sequence[Node],
    settings: Any,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """The record of one model.

    Args:
        walker: the model.
        means: its mean head outputs.
        examples: prompts with answers that the circuit was not found on.
        groups: of the circuit; without one, only what needs no circuit is measured.
        ranking: all nodes, strongest first; empty where there is no circuit.
        settings: `memory_mib`, `clauses`, `processes`, `prune_threshold`, `random_subsets`, `greedy_steps`,
            `greedy_examples`, `knockout_window`.
        generator: of the random sets.
    """
    circuit = frozenset(node for group in groups for node in group.nodes)
    positions = {node.position for node in circuit}
    model = Prepared.of(walker, means, in_tail_order(examples, positions), settings.memory_mib, settings.clauses)
    few = Prepared.of(walker, means, _spread(examples, settings.greedy_examples), settings.memory_mib, settings.clauses)

    def completeness_of_circuit() -> dict[str, Any]:
        removed: dict[str, Collection[Node]] = {group.name: frozenset(group.nodes) for group in groups}
        drawn = random_subsets(circuit, settings.random_subsets, generator)
        removed |= {f"random_{number}": nodes for number, nodes in enumerate(drawn, start=1)}
        removed[WORST] = greedy_worst(lambda sets: _gaps(few, circuit, sets), circuit, settings.greedy_steps)
        return completeness(model, circuit, removed)

    # in an order in which two processes have about the same to do
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if circuit:
        parts["completeness"] = completeness_of_circuit
        parts["minimality"] = lambda: minimality(model, circuit, settings.prune_threshold)
        parts["size_curve"] = lambda: size_curve(model, ranking, len(circuit))
    parts["knockout"] = lambda: knockout(model, positions, settings.knockout_window)
    found = in_processes(lambda name: parts[name](), list(parts), settings.processes)
    record: dict[str, Any] = {"n": len(examples), "completeness": None, "minimality": None, "size_curve": None}
    return record | dict(zip(parts, found, strict=True))


def minimality(model: Prepared, circuit: Collection[Node], threshold: float) -> dict[str, Any]:
    """Which heads of a circuit are missed, by accuracy; `trials` says with which K, and what F was before and after.

    Returns:
        `size` and number of `core` heads, `stand_ins` and `idle` heads; `faithfulness` of the core alone as a share
        of the circuit's accuracy, `faithfulness_ld` of its logit difference; and one trial for each head.
    """
    found = by_elimination(
        lambda circuits: model.in_place(circuits).correct.double().mean(0).tolist(), circuit, circuit, threshold
    )
    whole, core = model.in_place([frozenset(circuit), found.core]).means()
    difference = whole["logit_difference"]
    return {
        "threshold": threshold,
        "size": len(found.trials),
        "core": len(found.core),
        "stand_ins": len(found.stand_ins),
        "idle": len(found.idle),
        "accuracy": found.before,
        "core_accuracy": found.after,
        "core_share": found.after / found.before if found.before > 0 else None,
        "core_share_ld": core["logit_difference"] / difference if difference > 0 else None,
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
    for key, suffix in (("accuracy", ""), ("logit_difference", "_ld")):
        values = [entry[key] for entry in kept]
        shares = share_of_model(values, values[0], full[key])
        cpr, cmd = areas(grid, shares) if shares else (None, None)
        record |= {f"share{suffix}": shares, f"cpr{suffix}": cpr, f"cmd{suffix}": cmd}
        record[f"enough{suffix}"] = enough(grid, shares, ENOUGH) if shares else None
    return record


@torch.no_grad()
def knockout(model: Prepared, readers: Collection[str], width: int) -> dict[str, Any]:
    """Accuracy and logit difference by central layer for every path, named "query>key": the position `query` cannot
    see the position `key`, which stands before it.

    Args:
        model: the model with its examples.
        readers: positions that are blinded, beside the last one: those of the circuit.
        width: layers of a window.

    Returns:
        for each path the curves, and as `everywhere` what is left when all layers are blind.
    """
    walker = model.walker
    windows = [*layer_windows(walker.n_layers, width), range(walker.n_layers)]
    record: dict[str, Any] = {"window": width, "paths": {}}
    for query, key in _paths(model, readers):
        readouts = []
        for part in model.parts:
            index = slice(None, None, 1 if query == "last" else FEWER)
            some, clean = part.examples.select(index), part.clean.select(index)
            keys = _other_clause(some) if key == OTHER_CLAUSE else some.positions[key][:, None]
            logits = knocked_out(walker, clean, some.positions[query], keys, windows, model.memory_mib)
            readouts.append(Readout.of(logits, some.answer, some.others))
        found = Readout.join(readouts).means()
        record["paths"][f"{query}>{key}"] = {
            "accuracy": [entry["accuracy"] for entry in found[:-1]],
            "logit_difference": [entry["logit_difference"] for entry in found[:-1]],
            "everywhere": found[-1]["accuracy"],
            "everywhere_ld": found[-1]["logit_difference"],
        }
    return record


def _paths(model: Prepared, readers: Collection[str]) -> list[tuple[str, str]]:
    """AlignedPairs of a position and one that stands before it in every example, and the control."""

    def before(key: str, query: str) -> bool:
        return all(bool((part.examples.positions[key] < part.examples.positions[query]).all()) for part in model.parts)

    paths = [
        (query, key) for query in POSITIONS if query in {"last", *readers} for key in POSITIONS if before(key, query)
    ]
    return [*paths, ("last", OTHER_CLAUSE)]


def _other_clause(examples: Examples) -> Int[Tensor, "n k"]:
    """Positions of a clause that is not asked for: where the corrupt prompt, of the same form, has its own."""
    return torch.stack([examples.corrupt_positions[name] for name in CLAUSE_POSITIONS], dim=1)


def _spread(examples: Examples, n: int) -> Examples:
    """At most n of the examples, evenly spread over their order."""
    return examples.select(torch.linspace(0, len(examples) - 1, min(n, len(examples))).round().long())


def _gaps(model: Prepared, circuit: frozenset[Node], sets: Sequence[frozenset[Node]]) -> list[float]:
    kept, left = model.in_place([circuit - nodes for nodes in sets]).means(), model.without(sets).means()
    return [abs(a["accuracy"] - b["accuracy"]) for a, b in zip(kept, left, strict=True)]


def _verdict(found: Pruning, node: Node) -> str:
    return "core" if node in found.core else "stand-in" if node in found.stand_ins else "idle"
