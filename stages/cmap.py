"""Stage `cmap` (arm, seed): what do head outputs, or q, k or v, of the tuned model do in the base, and the reverse?

Entry `heads` has the same of every head of the circuit alone, on some of the examples: `damage` is what the base loses
by the tuned model's output of that head at that position, `repair` what the tuned model gains by the base's, both in
shares of the base's logit difference, so that they can be compared between heads and models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from stages.circuits.budget import MIB, making_bytes, pass_bytes, rows_that_fit, run_bytes
from stages.circuits.circuit import Circuit, Node
from stages.circuits.exchange import slices
from stages.circuits.transplant import random_like, read_at, transplant, transplant_each, transplant_inputs
from stages.circuits.walker import Walker
from stages.measures.prompts import Prompts, in_tail_order, placed, spread
from stages.measures.readout import Readout, reading
from stages.measures.scores import ratio
from stages.pipeline.checkpoints import load_for_analysis
from stages.pipeline.files import read_json, write_json
from stages.pipeline.processes import in_processes
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, run
from stages.tasks.examples import read_examples


def patch_both_ways(
    base: Walker,
    tuned: Walker,
    prompts: Prompts,
    node_sets: Mapping[str, Sequence[Node]],
    draws: int,
    memory_mib: float,
    generator: np.random.Generator,
    advance: Callable[[int], object] = lambda n: None,
    processes: int = 1,
    inputs: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores of both models, and of each with the other's head outputs, or inputs, at each node set.

    Args:
        base: one model.
        tuned: the other one.
        prompts: with answers, read by both models, at the positions where nodes are patched.
        node_sets: nodes by name.
        draws: random node sets of the same shape for each prompt and node set, the control.
        memory_mib: how much memory each process may take beside the models.
        generator: of those draws; both directions get the same ones.
        advance: called with the number of examples done.
        processes: how many to spread the examples over.
        inputs: of "q", "k" and "v" those that are transplanted, too, each alone and without random node sets.
    """
    length = prompts.input_ids.shape[1]
    shape = (base.n_layers, base.n_heads)
    random: dict[str, Bool[Tensor, "n draws layers q h"]] = {
        name: random_like(nodes, len(prompts), draws, *shape, generator) for name, nodes in node_sets.items()
    }
    directions = {"tuned_to_base": (tuned, base), "base_to_tuned": (base, tuned)}

    @torch.no_grad()
    def readings(rows: slice) -> dict[tuple[str, ...], Float[Tensor, "n e 4"]]:
        """Of the receiver alone and with each node set, and each input of it, in each direction."""
        part = prompts.select(rows)
        n, read = len(part), reading(part.answer, part.others)
        left = memory_mib - 2 * n * run_bytes(base, length) / MIB
        runs = {walker: walker.run(part.input_ids.to(walker.device)) for walker in (base, tuned)}
        found: dict[tuple[str, ...], Float[Tensor, "n e 4"]] = {}
        for direction, (donor, receiver) in directions.items():
            clean = runs[receiver]
            found[direction,] = read(clean.logits[:, None], slice(0, n))
            for name, nodes in node_sets.items():
                drawn = random[name][rows]
                found[direction, name] = transplant(
                    receiver, clean, runs[donor], part.positions, nodes, left, drawn, read
                )
                for component in inputs:
                    there, at = read_at(nodes, component, part.positions, n, length)
                    found[direction, name, component] = transplant_inputs(
                        receiver, clean, donor, runs[donor], at, there, component, left, reduce=read
                    )
        return found

    found = []
    each = run_bytes(base, length) + making_bytes(base, length)
    parts = slices(len(prompts), rows_that_fit(base, each, memory_mib * MIB, pass_bytes(base, length, length)))
    for rows, some in zip(parts, in_processes(readings, parts, processes), strict=True):
        found.append(some)
        advance(rows.stop - rows.start)
    scores = {key: Readout.join([some[key] for some in found]).means() for key in found[0]}
    base_alone, tuned_alone = scores["tuned_to_base",][0], scores["base_to_tuned",][0]
    return {
        "n": len(prompts),
        "base_accuracy": base_alone["accuracy"],
        "tuned_accuracy": tuned_alone["accuracy"],
        "base": base_alone,
        "tuned": tuned_alone,
        **{direction: {name: scores[direction, name][0] for name in node_sets} for direction in directions},
        "random": {
            direction: {name: _mean(scores[direction, name][1:]) for name in node_sets} for direction in directions
        },
        "inputs": {
            direction: {
                component: {name: scores[direction, name, component][0] for name in node_sets} for component in inputs
            }
            for direction in directions
        },
    }


def heads_alone(
    base: Walker, tuned: Walker, prompts: Prompts, nodes: Sequence[Node], memory_mib: float, processes: int = 1
) -> dict[str, Any]:
    """Entry `heads` of the record: every node transplanted alone, both ways.

    Args:
        base, tuned: the two models.
        prompts: read by both, best `prompts.in_tail_order`.
        nodes: of the circuit.
        memory_mib: how much memory each process may take beside the models.
        processes: how many to spread the prompts over.
    """
    length = prompts.input_ids.shape[1]
    places = [[node for node in nodes if node.position == name] for name in sorted({node.position for node in nodes})]
    directions = {"tuned_to_base": (tuned, base), "base_to_tuned": (base, tuned)}

    @torch.no_grad()
    def readings(rows: slice) -> dict[str, Float[Tensor, "n e 4"]]:
        """Of each receiver alone, then with one head after another."""
        part = prompts.select(rows)
        n, read = len(part), reading(part.answer, part.others)
        left = memory_mib - 2 * n * run_bytes(base, length) / MIB
        runs = {walker: walker.run(part.input_ids.to(walker.device)) for walker in (base, tuned)}
        found = {}
        for direction, (donor, receiver) in directions.items():
            clean, given = runs[receiver], runs[donor]
            alone = read(clean.logits[:, None], slice(0, n))
            each = [
                transplant_each(receiver, clean, given, part.positions, [[node] for node in place], left, read)
                for place in places
            ]
            found[direction] = torch.cat([alone, *each], dim=1)
        return found

    each = run_bytes(base, length) + making_bytes(base, length)
    parts = slices(len(prompts), rows_that_fit(base, each, memory_mib * MIB, pass_bytes(base, length, length)))
    found = list(in_processes(readings, parts, processes))
    scores = {name: Readout.join([some[name] for some in found]).means() for name in directions}
    whole, tuned_alone = (scores[name][0]["logit_difference"] for name in directions)
    ordered = [node for place in places for node in place]
    return {
        "n": len(prompts),
        "alone": [
            {
                "head": [node.layer, node.head],
                "position": node.position,
                "damage": ratio(whole - into_base["logit_difference"], whole),
                "repair": ratio(into_tuned["logit_difference"] - tuned_alone, whole),
                "tuned_to_base": into_base,
                "base_to_tuned": into_tuned,
            }
            for node, into_base, into_tuned in zip(
                ordered, scores["tuned_to_base"][1:], scores["base_to_tuned"][1:], strict=True
            )
        ],
    }


def _mean(entries: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(entry[key] for entry in entries) / len(entries) for key in entries[0]}


def main(cell: Cell) -> None:
    arm, seed = cell.item["arm"], cell.item["seed"]
    settings, available = cell.params("cmap"), resources()
    torch.set_num_threads(1)
    circuit = Circuit.from_json(read_json(f"reports/cells/discover/base/{seed}/circuit.json"))
    node_sets: dict[str, Sequence[Node]] = {}
    if circuit.identifiable:
        node_sets |= {group.name: group.nodes for group in circuit.groups}
        node_sets["circuit"] = circuit.nodes
    examples = in_tail_order(read_examples("data/old/evaluation.parquet"), {node.position for node in circuit.nodes})
    base, tuned = (Walker(load_for_analysis(f"models/{name}/{seed}", available)) for name in ("base", arm))
    with tqdm(total=len(examples), desc="cmap", unit="example") as bar:
        record = patch_both_ways(
            base,
            tuned,
            placed(examples, examples.places(settings.clauses)),
            node_sets,
            settings.random_draws,
            available.share_mib,
            np.random.default_rng([int(seed), 0]),
            bar.update,
            available.processes,
            settings.inputs,
        )
    record["heads"] = None
    if node_sets and settings.head_examples:
        few = in_tail_order(spread(examples, settings.head_examples), {node.position for node in circuit.nodes})
        placed_few = placed(few, few.places(settings.clauses))
        record["heads"] = heads_alone(base, tuned, placed_few, circuit.nodes, available.share_mib, available.processes)
    record |= {
        "arm": arm,
        "seed": int(seed),
        "settings": {
            "random_draws": settings.random_draws,
            "clauses": settings.clauses,
            "inputs": list(settings.inputs),
            "random_draws_of_inputs": 0,
            **available.stated(),
        },
    }
    write_json(f"reports/cells/cmap/{arm}/{seed}.json", record)


if __name__ == "__main__":
    run("cmap", ("arm", "seed"), main)
