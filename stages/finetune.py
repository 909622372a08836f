"""Fine-tune the base of a seed with one arm at one learning rate; keep checkpoints, and what is said of every step.

The model of an arm that was trained elsewhere is brought instead. An arm that takes no gradient steps has no learning
rate: its cells do and write the same, a few seconds' work, and DVC's cache has their outputs once.
"""

import importlib
import importlib.util
import logging
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from tqdm import tqdm

from stages.learning.adapters import with_adapters
from stages.learning.importing import bring
from stages.learning.last_layer import last_layer_at_the_end
from stages.learning.probes import Probe
from stages.learning.run import STEP_COLUMNS, Recorder, Run
from stages.learning.schedule import checkpoint_steps, prompt_order
from stages.learning.settings import CHOOSING, NO_RATE, CurveRow, Training
from stages.pipeline.checkpoints import load_model, load_tokenizer
from stages.pipeline.files import replacing_directory, write_csv
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, run
from stages.tasks.examples import read_examples, read_prompts

OLD = Path("data/old")


def main(cell: Cell) -> None:
    arm, seed, rate = cell.item["arm"], int(cell.item["seed"]), float(cell.item["learning_rate"])
    device, training = resources().device, Training(**dict(cell.params("finetune.common")))
    section, new = cell.params(f"finetune.{arm}"), Path("data/new") / cell.params("new_task")
    base, curve = Path(f"models/base/{seed}"), f"reports/cells/finetune/{arm}/{seed}/{rate}.csv"
    log = f"reports/cells/steps/{arm}/{seed}/{rate}.csv"
    about = {"arm": arm, "seed": seed, "learning_rate": rate if section.trained else NO_RATE}
    with replacing_directory(f"models/runs/{arm}/{seed}/{rate}") as folder:
        steps: list[CurveRow] = []
        if importlib.util.find_spec(f"stages.learning.arms.{arm}") is None:  # so params say what is to be imported
            old, probed = OLD / "selection.parquet", training.probe_examples
            rows = bring(arm, section, base, old, new / "selection.parquet", probed, folder)
        else:
            rows, steps = _train(arm, seed, rate, training, section, base, new, folder, device)
        write_csv(curve, pd.DataFrame([about | row for row in rows]))
        columns = [*about, *STEP_COLUMNS]
        write_csv(log, pd.DataFrame([about | row for row in steps], columns=columns))


def _train(
    arm: str,
    seed: int,
    rate: float,
    training: Training,
    section: Any,
    base: Path,
    new_task: Path,
    folder: Path,
    device: str,
) -> tuple[list[CurveRow], list[CurveRow]]:
    """One run; writes its checkpoints as it goes, returns the rows of its curve, and what is known of every step."""
    torch.set_num_threads(1)  # two would mostly wait for each other; other cells run at the same time
    _silence()
    model, tokenizer = load_model(base, device=device), load_tokenizer(base)
    train = read_prompts(new_task / "train.parquet")
    if arm in CHOOSING and train.one_answer:
        print(
            f"{arm}: every prompt of '{new_task.name}' has one right answer, so it learns from the same answers as "
            "sft_gold",
            file=sys.stderr,
        )
    model.set_attn_implementation("sdpa")  # the same function as eager attention, faster
    plain = model
    if training.lora is not None and section.trained:  # an arm that does not train moves the weights themselves
        model = with_adapters(model, training.lora, training.seed + seed)
    first = slice(0, training.probe_examples)
    old = read_examples(OLD / "selection.parquet").select(first)
    probe = Probe.of(model, old, read_prompts(new_task / "selection.parquet").select(first))
    title = f"{arm}, seed {seed}, learning rate {rate:g}"
    with tqdm(total=training.steps, desc=title, unit="step", disable=not section.trained) as bar:

        def report(step: int, row: CurveRow) -> None:
            bar.set_postfix_str(f"old {row['old_accuracy']:.2f}, new {row['new_accuracy']:.2f}", refresh=False)
            bar.update(step - bar.n)

        recorder = Recorder(model, probe, checkpoint_steps(training), report, folder)
        run = Run(
            arm=arm,
            seed=seed,
            learning_rate=rate,
            training=training,
            section=section,
            model=model,
            tokenizer=tokenizer,
            train=train,
            rehearsal=read_prompts(OLD / "train.parquet"),
            order=prompt_order(len(train), training, seed),
            watcher=recorder,
        )
        # the answer and the token before it; answers of several tokens are padded, and generated token by token
        with nullcontext() if train.several_tokens else last_layer_at_the_end(plain, tokens=2):
            importlib.import_module(f"stages.learning.arms.{arm}").train(run)
    return recorder.rows, recorder.steps


def _silence() -> None:
    """Leave the terminal to the progress bar and to errors."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    run("finetune", ("arm", "seed", "learning_rate"), main)
