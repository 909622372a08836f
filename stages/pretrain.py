"""Stage `pretrain`: train the small base of one seed.

A seed whose training gets stuck is tried again, at most `pretrain.retries` times, from the next derived seed:
attempt k of seed s draws weights and batches from (s, k). The record says how often that happened.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from stages.learning.pretraining import Progress, Settings, Stuck, measure_base, old_task, train
from stages.pipeline.checkpoints import load_tokenizer, save_model
from stages.pipeline.files import write_csv, write_json
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, Invalid, run
from stages.tasks.examples import read_examples
from stages.tasks.vocabulary import Vocabulary, vocabulary


def main(cell: Cell) -> None:
    settings, processes = cell.params("pretrain"), resources().processes
    boxes = cell.params("synthesize.boxes")
    seed = int(cell.item["seed"])
    tokenizer = load_tokenizer("data/tokenizer")
    words = vocabulary()
    if tokenizer.get_vocab() != words.ids:
        raise Invalid("data/tokenizer has another vocabulary than stages/tasks/vocabulary.py; run stage synthesize")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]

    model, curve, stuck = train_with_retries(words, settings, boxes, seed, settings.retries, processes)
    examples = read_examples("data/old/selection.parquet")
    correct, probability = old_task(model, examples.input_ids, examples.answer)
    record = {
        "seed": seed,
        "attempts": len(stuck) + 1,
        "stuck": stuck,
        "steps": curve[-1].step,
        "settle": settings.settle,
        "stop_at": settings.stop_at,
        "phase_ends": {check.phase: check.step for check in curve},
        "parameters": model.num_parameters(),
        "old_accuracy": float(correct.mean()),
        "old_p_correct": float(probability.mean()),
        **measure_base(model, words, boxes, len(examples), np.random.default_rng([seed, 1])),
    }
    folder = Path("reports/cells/pretrain", str(seed))
    write_csv(folder / "curve.csv", pd.DataFrame([asdict(check) for check in curve]))
    write_json(folder / "record.json", record)
    save_model(model, tokenizer, Path("models/base", str(seed)))


def train_with_retries(
    words: Vocabulary, settings: Settings, boxes: int, seed: int, retries: int, processes: int = 1
) -> tuple[LlamaForCausalLM, list[Progress], list[str]]:
    """Train one base.

    Returns:
        the model, its curve, and one sentence for every attempt that got stuck before.

    Raises:
        Invalid: all attempts got stuck.
    """
    stuck: list[str] = []
    for attempt in range(retries + 1):
        with _ProgressBar(f"base {seed}") as bar:
            try:
                model, curve = train(words, settings, boxes, [seed, attempt], bar.show, processes)
                return model, curve, stuck
            except Stuck as error:
                stuck.append(f"attempt {attempt}: {error}")
        tqdm.write(f"base {seed}, {stuck[-1]}" + ("; trying the next derived seed" if attempt < retries else ""))
    raise Invalid(
        f"pretrain.retries = {retries}: all {retries + 1} attempts of base {seed} got stuck ({stuck[-1]});"
        " raise the retries or that phase's most_steps"
    )


class _ProgressBar:
    """One bar a phase, with the last check beside it."""

    def __init__(self, name: str):
        self.name = name
        self.phase = ""
        self.bar: tqdm | None = None

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, phase: str, step: int, most_steps: int, check: Progress | None) -> None:
        if phase != self.phase or self.bar is None:
            if self.bar is not None:
                self.bar.close()
            self.bar = tqdm(total=most_steps, desc=f"{self.name}: {phase}", unit="step", mininterval=1.0)
            self.phase = phase
        if check is not None:
            repeated = f"{check.induction:.2f}"
            self.bar.set_postfix(accuracy=f"{check.accuracy:.2f}", repeats=repeated, refresh=False)
        self.bar.update(step - self.bar.n)


if __name__ == "__main__":
    run("pretrain", ("seed",), main)
