"""Stage `cmap` (arm, seed): what do head outputs of the tuned model do in the base, and the reverse?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from stages.circuits.circuit import Circuit, Node
from stages.circuits.exchange import rows_that_fit, slices
from stages.circuits.transplant import random_like, transplant
from stages.circuits.walker import Walker
from stages.measures.faithfulness import Readout, in_tail_order
from stages.pipeline.checkpoints import load_model
from stages.pipeline.files import read_json, write_json
from stages.pipeline.processes import in_processes
from stages.pipeline.stage import Cell, run
from stages.tasks.examples import Clauses, Examples, read_examples


def patch_both_ways(
    base: Walker,
    tuned: Walker,
    examples: Examples,
    node_sets: Mapping[str, Sequence[Node]],
    draws: int,
    memory_mib: float,
    generator: np.random.Generator,
    clauses: Clauses | str = Clauses.EVERY,
    advance: Callable[[int], object] = lambda n: None,
    processes: int = 1,
) -> dict[str, Any]:
    """Scores of both models, and of each with the other's head outputs at each node set.

    Args:
        base: one model.
        tuned: the other one.
        examples: prompts with answers, read by both models.
        node_sets: nodes by name.
        draws: random node sets of the same shape for each prompt and node set, the control.
        memory_mib: how much memory a pass may take, roughly.
        generator: of those draws; both directions get the same ones.
        clauses: where nodes at a token of a clause are patched.
        advance: called with the number of examples done.
        processes: how many to spread the examples over.
    """
    length = examples.input_ids.shape[1]
    shape = (base.n_layers, base.n_heads)
    random: dict[str, Bool[Tensor, "n draws layers q h"]] = {
        name: random_like(nodes, len(examples), draws, *shape, generator) for name, nodes in node_sets.items()
    }
    directions = {"tuned_to_base": (tuned, base), "base_to_tuned": (base, tuned)}

    @torch.no_grad()
    def readouts(rows: slice) -> dict[tuple[str, str | None], Readout]:
        """Of the receiver alone (None) and with each node set, in each direction."""
        part = examples.select(rows)
        places = part.places(clauses)
        runs = {walker: walker.run(part.input_ids) for walker in (base, tuned)}
        found: dict[tuple[str, str | None], Readout] = {}
        for direction, (donor, receiver) in directions.items():
            clean = runs[receiver]
            found[direction, None] = Readout.of(clean.logits[:, None], part.answer, part.others)
            for name, nodes in node_sets.items():
                logits = transplant(receiver, clean, runs[donor], places, nodes, memory_mib, random[name][rows])
                found[direction, name] = Readout.of(logits, part.answer, part.others)
        return found

    found = []
    parts = slices(len(examples), rows_that_fit(base, length, length, memory_mib))
    for rows, readout in zip(parts, in_processes(readouts, parts, processes), strict=True):
        found.append(readout)
        advance(rows.stop - rows.start)
    scores = {key: Readout.join([readout[key] for readout in found]).means() for key in found[0]}
    base_alone, tuned_alone = scores["tuned_to_base", None][0], scores["base_to_tuned", None][0]
    return {
        "n": len(examples),
        "base_accuracy": base_alone["accuracy"],
        "tuned_accuracy": tuned_alone["accuracy"],
        "base": base_alone,
        "tuned": tuned_alone,
        **{direction: {name: scores[direction, name][0] for name in node_sets} for direction in directions},
        "random": {
            direction: {name: _mean(scores[direction, name][1:]) for name in node_sets} for direction in directions
        },
    }


def _mean(entries: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(entry[key] for entry in entries) / len(entries) for key in entries[0]}


def main(cell: Cell) -> None:
    arm, seed = cell.item["arm"], cell.item["seed"]
    settings = cell.params("cmap")
    torch.set_num_threads(1)
    circuit = Circuit.from_json(read_json(f"reports/cells/discover/base/{seed}/circuit.json"))
    node_sets: dict[str, Sequence[Node]] = {}
    if circuit.identifiable:
        node_sets |= {group.name: group.nodes for group in circuit.groups}
        node_sets["circuit"] = circuit.nodes
    examples = in_tail_order(read_examples("data/old/evaluation.parquet"), {node.position for node in circuit.nodes})
    base, tuned = Walker(load_model(f"models/base/{seed}")), Walker(load_model(f"models/{arm}/{seed}"))
    with tqdm(total=len(examples), desc="cmap", unit="example") as bar:
        record = patch_both_ways(
            base,
            tuned,
            examples,
            node_sets,
            settings.random_draws,
            settings.memory_mib,
            np.random.default_rng([int(seed), 0]),
            settings.clauses,
            bar.update,
            settings.processes,
        )
    record |= {
        "arm": arm,
        "seed": int(seed),
        "settings": {"random_draws": settings.random_draws, "clauses": settings.clauses},
    }
    write_json(f"reports/cells/cmap/{arm}/{seed}.json", record)


if __name__ == "__main__":
    run("cmap", ("arm", "seed"), main)
