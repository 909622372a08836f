"""Fine-tune the base of a seed with one arm, once for each learning rate of the grid; keep checkpoints."""

import importlib.util
from pathlib import Path

from stages.learning.settings import Training
from stages.learning.workers import Job, run_jobs
from stages.pipeline.files import replacing_directory, write_csv
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, Invalid, run


def main(cell: Cell) -> None:
    arm, seed, available = cell.item["arm"], int(cell.item["seed"]), resources()
    if importlib.util.find_spec(f"stages.learning.arms.{arm}") is None:
        raise Invalid(f"arm = '{arm}': must name a file stages/learning/arms/{arm}.py")
    training = Training(**dict(cell.params("finetune.common")))
    section = cell.params(f"finetune.{arm}")
    # An arm without gradient steps lists its own grid, [0.0].
    rates = getattr(section, "learning_rates", training.learning_rates)
    new = Path("data/new") / cell.params("new_task")
    with replacing_directory(f"models/runs/{arm}/{seed}") as folder:
        jobs = [
            Job(
                arm=arm,
                seed=seed,
                index=index,
                learning_rate=rate,
                training=training,
                section=section,
                base=Path(f"models/base/{seed}"),
                train=new / "train.parquet",
                rehearsal=Path("data/old/train.parquet"),
                old=Path("data/old/selection.parquet"),
                new=new / "selection.parquet",
                folder=folder,
                device=available.device,
            )
            for index, rate in enumerate(rates)
        ]
        curves = run_jobs(jobs, available.processes)

        import pandas as pd  # only now: workers should not wait for it

        rows = [
            {"arm": arm, "seed": seed, "learning_rate": job.learning_rate} | row
            for job, curve in zip(jobs, curves, strict=True)
            for row in curve
        ]
        write_csv(f"reports/cells/finetune/{arm}/{seed}.csv", pd.DataFrame(rows))


if __name__ == "__main__":
    run("finetune", ("arm", "seed"), main)
