"""Stage `dcm` (model, seed): which information do the groups of the base's circuit carry in this model?

The desiderata `of_base` are asked of the base alone, in masks of their own. The base's masks are also trained a second
time, on other pairs.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from stages.circuits.circuit import Circuit
from stages.circuits.mask_training import MaskSettings, RankedHeads, mask_orders
from stages.circuits.masks import Carried, component_masks
from stages.circuits.walker import Walker
from stages.pipeline.checkpoints import load_for_analysis
from stages.pipeline.files import read_json, write_json
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, run
from stages.tasks.examples import DesiderataPairs, read_pairs


def read_desiderata(names: Sequence[str], split: str) -> dict[str, DesiderataPairs]:
    """The pairs of each desideratum."""
    return {name: read_pairs(f"data/desiderata/{name}/{split}.parquet") for name in names}


def main(cell: Cell) -> None:
    model, seed = cell.item["model"], cell.item["seed"]
    section, available = cell.params("dcm"), resources()
    torch.set_num_threads(1)
    settings = MaskSettings(
        steps=section.steps,
        batch=section.batch,
        learning_rate=section.learning_rate,
        start=section.start,
        sparsity=section.sparsity,
        objective=section.objective,
        tolerance=section.tolerance,
        memory_mib=available.share_mib,
    )
    circuit = Circuit.from_json(read_json(f"reports/cells/discover/base/{seed}/circuit.json"))
    asked = {"groups": section.desiderata, "additional": section.of_base if model == "base" else ()}
    found: dict[str, dict[tuple[str, str], Carried]] = {what: {} for what in asked}
    again: dict[str, dict[str, RankedHeads]] = {}
    if circuit.identifiable:
        walker = Walker(load_for_analysis(f"models/{model}/{seed}", available))
        rounds = [(number, what) for number, (what, names) in enumerate(asked.items()) if names]
        with tqdm(total=len(rounds) * (len(circuit.groups) + 2), desc="dcm", unit="step") as bar:

            def advance(what: str) -> None:
                bar.set_postfix_str(what)
                bar.update()

            for number, what in rounds:
                found[what] = component_masks(
                    walker,
                    read_desiderata(asked[what], "train"),
                    read_desiderata(asked[what], "selection"),
                    read_desiderata(asked[what], "test"),
                    circuit.groups,
                    settings,
                    np.random.default_rng([int(seed), number]),
                    advance,
                    available.processes,
                )
            if model == "base":
                again = _again(walker, section.desiderata, circuit, settings, available.processes)
    results: dict[str, dict[str, dict[str, object]]] = {what: {} for what in asked}
    for what, each in found.items():
        for (group, name), result in each.items():
            results[what].setdefault(group, {})[name] = asdict(result)
    stated = {key: value for key, value in asdict(settings).items() if key != "memory_mib"} | available.stated()
    record = {"model": model, "seed": int(seed), **results, "again": again, "settings": stated}
    write_json(f"reports/cells/dcm/{model}/{seed}.json", record)


def _again(
    walker: Walker, names: Sequence[str], circuit: Circuit, settings: MaskSettings, processes: int
) -> dict[str, dict[str, RankedHeads]]:
    """Group -> desideratum -> heads in the order of masks that are trained on other pairs, those of the selection: how
    alike masks of one model are is the most that masks of two models can be."""
    orders = mask_orders(walker, read_desiderata(names, "selection"), circuit.groups, settings, processes=processes)
    return {group.name: {name: orders[group.name, name] for name in names} for group in circuit.groups}


if __name__ == "__main__":
    run("dcm", ("model", "seed"), main)
