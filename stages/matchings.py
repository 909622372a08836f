"""Stage `matchings` (seed): what the base's circuit still does in the checkpoints of the other matchings.

reads  models/matched/<seed>/<arm>, one folder of weights for each arm, with an index from matching to file
writes reports/cells/matchings/<seed>/<arm>.json, one entry for each matching whose checkpoint is not the primary
       matching's; that one is measured by stage `evaluate`

All arms of a seed are one cell, so that Python's imports are paid for once.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from stages.circuits.circuit import Circuit
from stages.learning.checkpoints import set_weights, stored_weights
from stages.measures.checkpoints import record, scores
from stages.measures.prompts import in_tail_order, placed
from stages.pipeline.checkpoints import load_model
from stages.pipeline.files import read_json, replacing_directory, write_json
from stages.pipeline.processes import in_processes
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, run
from stages.tasks.examples import read_examples, read_prompts

MATCHED = Path("models/matched")


def main(cell: Cell) -> None:
    seed, arms = cell.item["seed"], list(cell.params("arms"))
    clauses, available = cell.params("evaluate.clauses"), resources()
    torch.set_num_threads(1)
    model = load_model(f"models/base/{seed}")
    circuit = Circuit.from_json(read_json(f"reports/cells/discover/base/{seed}/circuit.json"))
    nodes = frozenset(circuit.nodes if circuit.identifiable else ())
    prompts = read_examples("data/old/means.parquet").input_ids
    old = in_tail_order(read_examples("data/old/evaluation.parquet"), {node.position for node in nodes})
    old = placed(old, old.places(clauses))
    new = read_prompts(f"data/new/{cell.params('new_task')}/evaluation.parquet")

    index = {arm: read_json(MATCHED / seed / arm / "index.json") for arm in arms}
    files = [MATCHED / seed / arm / name for arm in arms for name in sorted(set(index[arm].values()))]

    def scored(file: Path) -> dict[str, object]:
        set_weights(model, stored_weights(file))
        return scores(model, nodes, prompts, old, new.input_ids, new.valid, available.share_mib)

    done = in_processes(scored, files, available.processes)
    found = dict(zip(files, tqdm(done, desc="matchings", unit="model", total=len(files)), strict=True))
    with replacing_directory(f"reports/cells/matchings/{seed}") as folder:
        for arm in arms:
            entries = {
                matching: record(len(nodes), found[MATCHED / seed / arm / name])
                for matching, name in index[arm].items()
            }
            write_json(folder / f"{arm}.json", {"arm": arm, "seed": int(seed), "matchings": entries})


if __name__ == "__main__":
    run("matchings", ("seed",), main)
