"""Stage `matchings` (arm, seed): what the base's circuit still does in the checkpoints of the other matchings.

reads  models/matched/<seed>/<arm>, weights or adapters, with an index from matching and learning rate to file
writes reports/cells/matchings/<seed>/<arm>.json, under each matching one entry for each learning rate whose checkpoint
       is not the primary one; that one is measured by stage `evaluate`
"""

from pathlib import Path

import torch
from tqdm import tqdm

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Circuit
from stages.circuits.walker import Walker
from stages.learning.checkpoints import read_checkpoint, set_weights, stored_weights
from stages.measures.checkpoints import Around, record, scores
from stages.measures.prompts import in_tail_order, placed
from stages.pipeline.checkpoints import load_for_analysis
from stages.pipeline.files import read_json, write_json
from stages.pipeline.processes import in_processes
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, run
from stages.tasks.examples import read_examples, read_prompts

MATCHED = Path("models/matched")


def main(cell: Cell) -> None:
    arm, seed = cell.item["arm"], cell.item["seed"]
    clauses, available = cell.params("evaluate.clauses"), resources()
    torch.set_num_threads(1)
    base_folder = Path(f"models/base/{seed}")
    base = stored_weights(*sorted(base_folder.glob("*.safetensors")))
    model = load_for_analysis(base_folder, available)
    circuit = Circuit.from_json(read_json(f"reports/cells/discover/base/{seed}/circuit.json"))
    nodes = frozenset(circuit.nodes if circuit.identifiable else ())
    prompts = read_examples("data/old/means.parquet").input_ids
    old = in_tail_order(read_examples("data/old/evaluation.parquet"), {node.position for node in nodes})
    kinds, donors = cell.params("evaluate.matching_ablations"), old.corrupt_ids
    old = placed(old, old.places(clauses))
    new = read_prompts(f"data/new/{cell.params('new_task')}/evaluation.parquet")
    around = None
    if kinds:
        start = Walker(load_for_analysis(base_folder, available))
        means = mean_outputs(start, prompts, available.share_mib, available.processes)
        around = Around(start, means, donors, kinds)

    folder = MATCHED / seed / arm
    index = read_json(folder / "index.json")
    names = sorted({name for files in index.values() for name in files.values()})

    def scored(name: str) -> dict[str, object]:
        file = folder / name
        set_weights(model, read_checkpoint(file.parent, int(file.stem), base))
        return scores(model, nodes, prompts, old, new, available.share_mib, around)

    done = in_processes(scored, names, available.processes)
    found = dict(zip(names, tqdm(done, desc="matchings", unit="model", total=len(names)), strict=True))
    entries = {
        matching: {rate: record(len(nodes), found[name]) for rate, name in files.items()}
        for matching, files in index.items()
    }
    write_json(f"reports/cells/matchings/{seed}/{arm}.json", {"arm": arm, "seed": int(seed), "matchings": entries})


if __name__ == "__main__":
    run("matchings", ("arm", "seed"), main)
