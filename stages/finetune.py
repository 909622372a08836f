"""Fine-tune the base of a seed with one arm, once for each learning rate of the grid; keep checkpoints.

The model of an arm that was trained elsewhere is brought instead.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.learning.importing import RATE, bring
from stages.learning.settings import CHOOSING, CurveRow, Training
from stages.learning.workers import Job, run_jobs
from stages.pipeline.files import replacing_directory, write_csv
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, run


def main(cell: Cell) -> None:
    arm, seed, available = cell.item["arm"], int(cell.item["seed"]), resources()
    training = Training(**dict(cell.params("finetune.common")))
    section = cell.params(f"finetune.{arm}")
    # An arm without gradient steps lists its own grid, [0.0].
    rates = getattr(section, "learning_rates", training.learning_rates)
    task = cell.params("new_task")
    new = Path("data/new") / task
    if arm in CHOOSING and _one_answer(new / "train.parquet"):
        print(
            f"{arm}: every prompt of '{task}' has one right answer, so it learns from the same answers as sft_gold",
            file=sys.stderr,
        )
    base, old = Path(f"models/base/{seed}"), Path("data/old/selection.parquet")
    with replacing_directory(f"models/runs/{arm}/{seed}") as folder:
        if importlib.util.find_spec(f"stages.learning.arms.{arm}") is None:  # so params say what is to be imported
            found = bring(arm, section, base, old, new / "selection.parquet", training.probe_examples, folder)
            return _write_curve(arm, seed, {RATE: found})
        jobs = [
            Job(
                arm=arm,
                seed=seed,
                index=index,
                learning_rate=rate,
                training=training,
                section=section,
                base=base,
                train=new / "train.parquet",
                rehearsal=Path("data/old/train.parquet"),
                old=old,
                new=new / "selection.parquet",
                folder=folder,
                device=available.device,
            )
            for index, rate in enumerate(rates)
        ]
        curves = run_jobs(jobs, available.processes)
        _write_curve(arm, seed, dict(zip(rates, curves, strict=True)))


def _one_answer(prompts: Path) -> bool:
    """Whether every prompt of a file has one right answer (`Prompts.one_answer`, without loading torch)."""
    import pyarrow.parquet as pq

    return pq.read_schema(prompts).field("valid").type.list_size == 1


def _write_curve(arm: str, seed: int, curves: Mapping[float, Sequence[CurveRow]]) -> None:
    """Write the curves of all learning rates as one."""
    import pandas as pd  # only now: workers should not wait for it

    rows = [{"arm": arm, "seed": seed, "learning_rate": rate} | row for rate, curve in curves.items() for row in curve]
    write_csv(f"reports/cells/finetune/{arm}/{seed}.csv", pd.DataFrame(rows))


if __name__ == "__main__":
    run("finetune", ("arm", "seed"), main)
