"""Stage `dcm` (model, seed): which information do the groups of the base's circuit carry in this model?"""

from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from stages.circuits.masks import MaskSettings, component_masks
from stages.circuits.types import Circuit
from stages.circuits.walker import Walker
from stages.pipeline.checkpoints import load_model
from stages.pipeline.files import read_json, write_json
from stages.pipeline.stage import Cell, run
from stages.tasks.examples import DesiderataPairs, read_pairs

DESIDERATA = ("positional", "object_value", "box_label_value")


def read_desiderata(split: str) -> dict[str, DesiderataPairs]:
    """The pairs of each desideratum."""
    return {name: read_pairs(f"data/desiderata/{name}/{split}.parquet") for name in DESIDERATA}


def main(cell: Cell) -> None:
    model, seed = cell.item["model"], cell.item["seed"]
    section = cell.params("dcm")
    torch.set_num_threads(1)
    settings = MaskSettings(
        steps=section.steps,
        batch=section.batch,
        learning_rate=section.learning_rate,
        start=section.start,
        sparsity=section.sparsity,
        objective=section.objective,
        tolerance=section.tolerance,
        memory_mib=section.memory_mib,
    )
    circuit = Circuit.from_json(read_json(f"reports/cells/discover/base/{seed}/circuit.json"))
    found = {}
    if circuit.identifiable:
        with tqdm(total=len(circuit.groups) + 2, desc="dcm", unit="step") as bar:

            def advance(what: str) -> None:
                bar.set_postfix_str(what)
                bar.update()

            found = component_masks(
                Walker(load_model(f"models/{model}/{seed}")),
                read_desiderata("train"),
                read_desiderata("selection"),
                read_desiderata("test"),
                circuit.groups,
                settings,
                np.random.default_rng([int(seed), 0]),
                advance,
                section.processes,
            )
    groups = {group: {name: asdict(result) for name, result in each.items()} for group, each in found.items()}
    stated = {key: value for key, value in asdict(settings).items() if key != "memory_mib"}
    record = {"model": model, "seed": int(seed), "groups": groups, "settings": stated}
    write_json(f"reports/cells/dcm/{model}/{seed}.json", record)


if __name__ == "__main__":
    run("dcm", ("model", "seed"), main)
