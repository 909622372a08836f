"""Stage `evaluate` (model, seed): does the base's circuit still do the old task in this model?

The base's circuit stands in the model with everything else mean-ablated (with the model's own means), beside
the same in the queried clause alone, the model's own circuit, random circuits of the same shape, the circuit
without each of its groups, and the model without each group. `inspection` is a closer look at that circuit on
the pruning split: complete, minimal, faithful at which size, and fed by which layers. `examples` has texts of 0 and 1
for the whole model and for the base's circuit in it: which examples of the evaluation split, in the order of its file,
are answered right, of the whole vocabulary and of the candidates. `circuit_by_ablation` has that circuit with other
outputs around it.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Circuit, Node
from stages.circuits.exchange import random_nodes
from stages.circuits.scores import Metric
from stages.circuits.walker import Walker
from stages.learning.probes import score_answers
from stages.measures.by_ablation import Ablation, Resampled, circuit_with, from_donor
from stages.measures.faithfulness import circuit_record, evaluate_circuits, outcomes
from stages.measures.inspection import Path as AttentionPath
from stages.measures.inspection import inspect
from stages.measures.prompts import in_tail_order, placed, spread, tail_order
from stages.measures.readout import Readout
from stages.measures.scores import ENDINGS, ratio
from stages.measures.size_curve import ranked_nodes
from stages.pipeline.checkpoints import load_for_analysis
from stages.pipeline.files import read_json, write_json
from stages.pipeline.resources import Resources, resources
from stages.pipeline.stage import Cell, run
from stages.tasks.examples import Examples, Prompts, read_examples, read_prompts

QUERIED = "{} of the queried clause"  # a position where a node is kept in no other clause, as Prakash et al. do
OTHER_CLAUSE = "another_clause"  # the control of knockout: all named positions of a clause that was not asked for
FEWER = 4  # knockouts at positions before the last one, which cost more, take every so many-th example


def evaluate(
    walker: Walker,
    means: Float[Tensor, "layers t h a"],
    base_circuit: Circuit,
    own_circuit: Circuit,
    old: Examples,
    new: Prompts,
    settings: Any,
    seed: int,
    available: Resources,
) -> dict[str, Any]:
    """The record of one cell, less its names.

    Args:
        walker: the model.
        means: its mean head outputs.
        base_circuit: circuit of the base.
        own_circuit: circuit that was found in the model.
        old: evaluation examples of the old task.
        new: evaluation prompts of the new task.
        settings: section `evaluate` of params.yaml.
        seed: of the random circuits: the same ones for every model of the seed.
        available: processes, and their memory beside the model.
    """
    memory, processes = available.share_mib, available.processes
    groups = base_circuit.groups if base_circuit.identifiable else ()
    nodes = frozenset(base_circuit.nodes if base_circuit.identifiable else ())
    own_nodes = frozenset(own_circuit.nodes if own_circuit.identifiable else ())
    order = tail_order(old, {node.position for node in nodes})
    old = old.select(order)
    queried = {QUERIED.format(name): at for name, at in old.positions.items()}
    prompts = placed(old, {**old.places(settings.clauses), **queried})
    generator = np.random.default_rng([seed, 0])
    shape = (walker.n_layers, walker.n_heads)
    random = [random_nodes(nodes, *shape, generator) for _ in range(settings.random_circuits)] if nodes else []
    nodes_in_queried_clause = [Node(node.layer, node.head, QUERIED.format(node.position)) for node in nodes]
    circuits: list[Collection[Node]] = [nodes, own_nodes, *(nodes - set(group.nodes) for group in groups), *random]
    if old.every_clause:
        circuits.append(nodes_in_queried_clause)

    with tqdm(total=len(old), desc="evaluate", unit="example") as bar:
        removed = [group.nodes for group in groups]
        found = evaluate_circuits(walker, means, prompts, circuits, removed, memory, bar.update, processes)

    full, without = found.full.means()[0], found.without.means()
    kept = found.in_place.means()
    queried_alone = kept.pop() if old.every_clause else None
    return {
        **{f"old_{score}": value for score, value in full.items()},
        "old_chance": float((1 / (1 + (old.others >= 0).sum(1))).double().mean()),
        **_new_scores(walker, new),
        "n_old": len(old),
        "n_new": len(new),
        "circuit": circuit_record(len(nodes), kept[0], full) if nodes else None,
        "circuit_in_queried_clause": circuit_record(len(nodes), queried_alone, full)
        if nodes and queried_alone
        else None,
        "own_circuit": circuit_record(len(own_nodes), kept[1], full) if own_nodes else None,
        "groups": {
            group.name: {
                "size": len(group.heads),
                **_missing("", kept[0], kept[2 + index]),
                **_missing("model_", full, without[index]),
            }
            for index, group in enumerate(groups)
        },
        "examples": _outcomes("model", found.full, order)
        | (_outcomes("circuit", found.in_place, order) if nodes else {}),
        "random": _random_record(kept[2 + len(groups) :], full) if random else None,
    }


def circuit_by_ablation(
    walker: Walker,
    base: Walker,
    base_means: Float[Tensor, "layers t h a"],
    circuit: Circuit,
    old: Examples,
    record: Mapping[str, Any],
    clauses: str,
    available: Resources,
) -> dict[str, Any] | None:
    """Entry `circuit_by_ablation` of the record: the base's circuit as in `circuit`, and with other outputs around it
    (`measures.by_ablation`); None where the base has no circuit.

    Args:
        walker, base: the model, and its base, which may be the same.
        base_means: mean head outputs of the base.
        circuit: of the base.
        old: evaluation examples of the old task; the corrupt partners are what heads are resampled from.
        record: what `evaluate` gives.
        clauses: where a head at a token of a clause is kept.
        available: processes, and their memory beside the models.
    """
    if record["circuit"] is None:
        return None
    old = in_tail_order(old, {node.position for node in circuit.nodes})
    prompts, donors = placed(old, old.places(clauses)), old.corrupt_ids
    full = {score: record[f"old_{score}"] for score in ENDINGS}
    kinds: dict[str, Ablation] = {"base_means": base_means, "resampled": Resampled(walker, donors)}
    kinds |= {"base_resampled": Resampled(base, donors)}
    found = {"own_means": dict(record["circuit"])}
    for kind, ablation in kinds.items():
        if base is walker and kind != "resampled":
            found[kind] = dict(found["own_means" if kind == "base_means" else "resampled"])
            continue
        kept, said = circuit_with(walker, prompts, circuit.nodes, ablation, available.share_mib, available.processes)
        found[kind] = circuit_record(len(set(circuit.nodes)), kept.means()[0], full)
        if isinstance(ablation, Resampled):
            found[kind]["from_donor"] = from_donor(said, prompts.input_ids, donors).double().mean().item()
    return found


def _outcomes(name: str, readout: Readout, order: Int[Tensor, " n"]) -> dict[str, str]:
    """What the first variant answers right, of all tokens and of the candidates."""
    return {
        name: outcomes(readout.correct[:, 0], order),
        f"{name}_candidates": outcomes(readout.best_candidate[:, 0], order),
    }


def _missing(prefix: str, whole: Mapping[str, float], left: Mapping[str, float]) -> dict[str, float]:
    """Each score without a group, and how much less that is."""
    without = {f"{prefix}{score}_without": left[score] for score in ENDINGS}
    return without | {f"{prefix}{score}_drop": whole[score] - left[score] for score in ENDINGS}


def _new_scores(walker: Walker, new: Prompts) -> dict[str, float]:
    scores = score_answers(walker.model, new)
    return {
        "new_accuracy": float(scores.right.double().mean()),
        "new_valid_mass": float(scores.valid_mass.mean()),
    }


def _random_record(kept: list[dict[str, float]], full: dict[str, float]) -> dict[str, Any]:
    accuracies = [entry["accuracy"] for entry in kept]
    return {
        "n": len(kept),
        "accuracies": accuracies,
        "mean": sum(accuracies) / len(kept),
        "max": max(accuracies),
        **{
            f"faithfulness{ending}": [ratio(entry[score], full[score]) for entry in kept]
            for score, ending in ENDINGS.items()
        },
    }


def closer_look(
    walker: Walker, means: Float[Tensor, "layers t h a"], folder: Path, settings: Any, seed: int, available: Resources
) -> dict[str, Any]:
    """Entry `inspection` of the record.

    Args:
        walker: the model.
        means: its mean head outputs.
        folder: what stage `discover` wrote for its base.
        settings: section `evaluate` of params.yaml.
        seed: of the random sets of heads.
        available: processes, and their memory beside the model.
    """
    circuit = Circuit.from_json(read_json(folder / "circuit.json"))
    examples = read_examples("data/old/pruning.parquet")
    ranking = _ranking(folder, circuit, examples) if circuit.identifiable and circuit.groups else []
    generator = np.random.default_rng([seed, 1])
    return inspect_circuit(walker, means, examples, circuit, ranking, settings, generator, available)


def inspect_circuit(
    walker: Walker,
    means: Float[Tensor, "layers t h a"],
    examples: Examples,
    circuit: Circuit,
    ranking: Sequence[Node],
    settings: Any,
    generator: np.random.Generator,
    available: Resources,
) -> dict[str, Any]:
    """`inspection.inspect` of a circuit, with knockouts between the task's positions."""
    groups = circuit.groups if circuit.identifiable else ()
    positions = {node.position for group in groups for node in group.nodes}
    ordered = in_tail_order(examples, positions)
    few = spread(examples, settings.greedy_examples)
    paths = knockout_paths(ordered, positions)
    prompts, few = (placed(some, some.places(settings.clauses)) for some in (ordered, few))
    return inspect(walker, means, prompts, few, groups, ranking, paths, settings, generator, available)


def knockout_paths(examples: Examples, readers: Collection[str]) -> dict[str, AttentionPath]:
    """Paths "query>key" from each position to each that stands before it in every example, and the control of a task
    with clauses: one that is not asked for, which stands where the corrupt prompt, of the same form, has its own.

    Args:
        examples: the prompts.
        readers: positions that are blinded, beside the last one: those of the circuit.
    """
    at, readout = examples.positions, examples.readout
    paths = {
        f"{query}>{key}": AttentionPath(at[query], at[key][:, None], 1 if query == readout else FEWER)
        for query in at
        if query in {readout, *readers}
        for key in at
        if bool((at[key] < at[query]).all())
    }
    if not examples.every_clause:
        return paths
    other = torch.stack([examples.corrupt_positions[name] for name in examples.every_clause], dim=1)
    return {**paths, f"{readout}>{OTHER_CLAUSE}": AttentionPath(at[readout], other)}


def _ranking(folder: Path, circuit: Circuit, examples: Examples) -> list[Node]:
    """Every node by the largest score that the base's head had in any hop from its position; a head that works against
    the answer in the circuit by how much it does."""
    record = read_json(folder / "record.json")
    sign = -1.0 if record["settings"]["score"] == Metric.RELATIVE_PROBABILITY else 1.0
    shape = (circuit.n_layers, circuit.n_heads)
    strengths = {position: np.full(shape, -np.inf) for position in examples.positions}
    with np.load(folder / "scores.npz") as scores:
        for hop in record["hops"]:
            name, position = f"{hop['name']}.score", hop["position"]
            if name in scores:  # a hop with nothing above the noise has no scores
                strengths[position] = np.maximum(strengths[position], sign * scores[name])
    for group in circuit.groups:
        if group.sign < 0:
            for head, score in zip(group.heads, group.scores, strict=True):
                strengths[group.position][head] = max(strengths[group.position][head], abs(score))
    return ranked_nodes(strengths)


def main(cell: Cell) -> None:
    model, seed, available = cell.item["model"], cell.item["seed"], resources()
    walker = Walker(load_for_analysis(f"models/{model}/{seed}", available))
    circuits = Path("reports/cells/discover")
    settings = cell.params("evaluate")
    torch.set_num_threads(1)
    prompts = read_examples("data/old/means.parquet").input_ids
    means = mean_outputs(walker, prompts, available.share_mib, available.processes)
    circuit, own_circuit = (Circuit.from_json(read_json(circuits / m / seed / "circuit.json")) for m in ("base", model))
    old = read_examples("data/old/evaluation.parquet")
    record = evaluate(
        walker,
        means,
        circuit,
        own_circuit,
        old,
        read_prompts(f"data/new/{cell.params('new_task')}/evaluation.parquet"),
        settings,
        int(seed),
        available,
    )
    base = walker if model == "base" else Walker(load_for_analysis(f"models/base/{seed}", available))
    base_means = means if base is walker else mean_outputs(base, prompts, available.share_mib, available.processes)
    record["circuit_by_ablation"] = circuit_by_ablation(
        walker, base, base_means, circuit, old, record, str(settings.clauses), available
    )
    del base
    record["inspection"] = closer_look(walker, means, circuits / "base" / seed, settings, int(seed), available)
    record |= {"model": model, "seed": int(seed)}
    record["settings"] = {"random_circuits": settings.random_circuits, "clauses": str(settings.clauses)}
    record["settings"] |= available.stated()
    write_json(f"reports/cells/evaluate/{model}/{seed}.json", record)


if __name__ == "__main__":
    run("evaluate", ("model", "seed"), main)
