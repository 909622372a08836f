"""Stage `pretrain`: the base of one seed: trained from nothing, or pretrained and taught the old task.

With `source.kind: curriculum` a small model is trained (`learning/pretraining.py`). Else the base is the model in
models/source, which is taught the old task if `teach` says so, with the seed's own prompts (`learning/teaching.py`);
bases of other seeds differ in that alone. A base that is taught must do it to `teach.level`.

A small model whose training gets stuck is tried again, at most `pretrain.retries` times, from the next derived seed:
attempt k of seed s draws weights and batches from (s, k). The record says how often that happened.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from stages.learning.import_checks import refuse_unfit
from stages.learning.knowledge import measure_base, old_scores
from stages.learning.pretraining import Progress, Settings, Stuck, train
from stages.learning.settings import CurveRow
from stages.pipeline.checkpoints import load_model, load_tokenizer, save_model
from stages.pipeline.files import write_csv, write_json
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, Invalid, run
from stages.tasks.examples import Examples, read_examples, read_prompts
from stages.tasks.old_tasks import old_tasks
from stages.tasks.vocabulary import WordVocabulary, vocabulary_of

SOURCE = Path("models/source")
THREADS = 2  # of teaching; its rounding depends on their number, so it is not what the environment says
FEWER = 48  # prompts of each kind that a pretrained base is measured on, which cost more


def main(cell: Cell) -> None:
    settings, source, available = cell.params("pretrain"), cell.params("source"), resources()
    boxes, asked = cell.params("synthesize.boxes"), cell.params("old_task")
    seed = int(cell.item["seed"])
    tokenizer = load_tokenizer(SOURCE)
    refuse_unfit(cell, SOURCE, thoroughly=False)  # those that were named after stage `source` ran
    words = vocabulary_of(tokenizer, source.bos)
    torch.use_deterministic_algorithms(True, warn_only=available.device != "cpu")
    # Nothing here reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]

    examples = read_examples("data/old/selection.parquet")
    if source.kind == "curriculum":
        if not isinstance(words, WordVocabulary):
            raise Invalid(f"{SOURCE} has another tokenizer than stages/tasks/tokenizer.py; run stage source")
        torch.set_num_threads(1)
        model, checks, stuck = train_with_retries(words, settings, boxes, seed, settings.retries, available.processes)
        rows = [asdict(check) for check in checks]
        how = {
            "attempts": len(stuck) + 1,
            "stuck": stuck,
            "steps": checks[-1].step,
            "settle": settings.settle,
            "stop_at": settings.stop_at,
            "phase_ends": {check.phase: check.step for check in checks},
        }
        n, stated = len(examples), {}
    else:
        teaching = cell.params("teach")
        torch.set_num_threads(THREADS)
        model = load_model(SOURCE, device=available.device)
        rows, how, stated = [], {"taught": None, "steps": 0}, available.stated()
        stated.pop("dtype", None)  # it is taught in float32
        if teaching is not None:
            rows = _taught(model, tokenizer, examples, teaching, seed)
            how = {"taught": teaching.model_dump(mode="json"), "steps": int(rows[-1]["step"])}
        n = min(len(examples), FEWER)
    old = old_scores(model, examples.input_ids, examples.answer)
    if source.kind != "curriculum" and cell.params("teach") is None:
        _refuse_ignorant(old["accuracy"], asked, cell.undeclared("discover.identifiable_accuracy"))
    record = {
        "seed": seed,
        "source": source.kind,
        **how,
        **({"settings": stated} if stated else {}),
        "parameters": model.num_parameters(),
        "old_accuracy": old["accuracy"],
        "old_p_correct": old["p_correct"],
        **measure_base(model, old_tasks()[asked](words, boxes), n, [seed, 1]),
    }
    folder = Path("reports/cells/pretrain", str(seed))
    write_csv(folder / "curve.csv", pd.DataFrame(rows or [{"step": 0, **old}]))  # a model that is taken as it is
    write_json(folder / "record.json", record)
    save_model(model, tokenizer, Path("models/base", str(seed)))


def _refuse_ignorant(accuracy: float, task: str, least: float) -> None:
    """Of a model that is taken as it is: without the old task it has no circuit that fine-tuning could keep."""
    if accuracy < least:
        raise Invalid(
            f"source: the model answers {accuracy:.3f} of the selection prompts of old_task = '{task}', below "
            f"discover.identifiable_accuracy = {least:g}: must be taught it (teach), or be another model"
        )


def _taught(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Examples, teaching: Any, seed: int
) -> list[CurveRow]:
    """The checks of a pretrained model that is taught the old task, in place."""
    from stages.learning.teaching import teach  # TRL, which takes seconds

    train = read_prompts("data/old/train.parquet")
    model.set_attn_implementation("sdpa")  # the same function as eager attention, faster
    with tqdm(total=teaching.most_steps, desc=f"teach base {seed}", unit="step") as bar:

        def show(step: int, check: CurveRow) -> None:
            bar.set_postfix(accuracy=f"{check['accuracy']:.2f}", refresh=False)
            bar.update(step - bar.n)

        checks = teach(model, tokenizer, train, examples, teaching, seed, show)
    model.set_attn_implementation("eager")
    return checks


def train_with_retries(
    words: WordVocabulary, settings: Settings, boxes: int, seed: int, retries: int, processes: int = 1
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
