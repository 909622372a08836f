"""Stage `match` (arm, seed): pick the checkpoints at which the arms are compared.

The primary one, at the frozen new-task level, is written as a model folder, which the stages below read. The ones of
the other matchings (see `stages/learning/matching.py`) are written as bare weights, each once, with an index that says
which matching picked which; stage `matchings` tests the circuit in them. Of an arm with adapters both hold these alone,
in PEFT's format, whose base is the base. The record holds what every matching picked at every learning rate.

An imported arm has one model, which is picked as it is: no level is asked of it, and it is at no other matching.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from stages.learning.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Weights,
    checkpoint_file,
    read_checkpoint,
    set_weights,
    stored_weights,
)
from stages.learning.importing import IMPORTED
from stages.learning.matching import (
    ACCURACY,
    Matching,
    Pick,
    distance,
    matchings,
    moved_as_far,
    pick,
    read_curves,
    rule,
)
from stages.learning.settings import NO_RATE, CurveRow
from stages.pipeline.files import read_json, replacing_directory, write_json
from stages.pipeline.resources import resources
from stages.pipeline.stage import Cell, Invalid, run

MODEL_FILE = "model.safetensors"
_COLUMNS = ("new_accuracy", "old_accuracy", "kl_new", "weight_norm", "gradient_steps")


@dataclass(frozen=True)
class Source:
    """Where the weights of an arm's checkpoints come from.

    Attributes:
        folder: of the base.
        base: its weights.
        run: folder of the run at the learning rate of the matching.
        direction: of an arm without training: weights whose direction from the base is followed as far as the
            checkpoint went; else None.
    """

    folder: Path
    base: Weights
    run: Path
    direction: Weights | None

    def weights(self, step: int) -> Weights:
        found = read_checkpoint(self.run, step, self.base)
        return found if self.direction is None else moved_as_far(self.base, self.direction, found)

    def save(self, step: int, folder: Path, whole: str, adapters: str) -> None:
        """Write a checkpoint: its weights as file `whole`, or its adapters as file `adapters` beside their config."""
        config = self.run / ADAPTER_CONFIG
        if self.direction is None and config.is_file():
            write_json(folder / ADAPTER_CONFIG, read_json(config) | {"base_model_name_or_path": str(self.folder)})
            shutil.copyfile(checkpoint_file(self.run, step), folder / adapters)
        else:
            save_file(dict(self.weights(step)), folder / whole, metadata={"format": "pt"})


def main(cell: Cell) -> None:
    arm, seed = cell.item["arm"], cell.item["seed"]
    settings, available = cell.params("match"), resources()
    rate, rates, confirm = settings.learning_rate, cell.params("learning_rates"), settings.confirm
    new_task = cell.params("new_task")
    wanted = matchings(settings.levels, settings.kl, settings.norm, settings.steps)
    primary = Matching(ACCURACY, settings.level)
    _refuse_shortcut_levels(settings.levels, new_task)

    base_folder, target = Path(f"models/base/{seed}"), Path(f"models/{arm}/{seed}")
    base = stored_weights(*sorted(base_folder.glob("*.safetensors")))
    curves, own_run = _curves(arm, seed, rates), _run_folder(arm, seed, rate)
    brought = (own_run / IMPORTED).is_file()
    untrained = NO_RATE in curves and not brought
    like, direction = arm, None
    if untrained:
        like, last = settings.noise_like, int(max(row["step"] for row in curves[NO_RATE]))
        direction, curves = read_checkpoint(own_run, last, base), _curves(like, seed, rates)
    as_it_is = NO_RATE in curves  # imported, the arm itself or the one that noise imitates
    rows = curves[NO_RATE if as_it_is else rate]
    source = Source(base_folder, base, _run_folder(like, seed, rate), direction)
    picks = {m: Pick(m == primary, rows[-1], rows[-1][m.by]) if as_it_is else pick(rows, m, confirm) for m in wanted}
    picked = picks[primary]

    with replacing_directory(target) as folder:
        for file in sorted(base_folder.glob("*.json")):  # config and tokenizer
            if not file.name.endswith(".index.json"):  # of a base in several files
                shutil.copyfile(file, folder / file.name)
        source.save(picked.step, folder, MODEL_FILE, ADAPTER_WEIGHTS)

    others = {m: p.step for m, p in picks.items() if p.reached and p.step != picked.step}
    with replacing_directory(f"models/matched/{seed}/{arm}") as folder:
        for step in sorted(set(others.values())):
            name = checkpoint_file(folder, step).name
            source.save(step, folder, whole=name, adapters=name)
        write_json(folder / "index.json", {m.name: checkpoint_file(folder, step).name for m, step in others.items()})

    by_rate: dict[Matching, dict[str, Any]]
    if brought:
        own = picked.row
        text = "imported: the model as it is, no level is asked of it"
        columns = {column: own[column] for column in _COLUMNS}
        by_rate = {m: {f"{rate:g}": {"reached": p.reached} | columns} for m, p in picks.items()}
    elif untrained:
        steps = {picks[m].step for m in wanted}
        scored = _scores(base_folder, source, steps, new_task, available.device)
        own = scored[picked.step]
        by_rate = {m: {f"{rate:g}": {"reached": p.reached} | scored[p.step]} for m, p in picks.items()}
        text = f"each tensor moved as far as in the picked checkpoint of '{like}', along a random direction"
    else:
        own = picked.row
        text = rule(confirm)
        by_rate = {m: {f"{key:g}": _numbers(run, m, confirm) for key, run in curves.items()} for m in wanted}
    record = {
        "arm": arm,
        "seed": int(seed),
        "reached": picked.reached,  # of an untrained arm: whether the arm that it imitates did
        "rule": text,
        "like": like if untrained else None,
        "matching": primary.name,
        "level": settings.level,
        "learning_rate": rate,
        "step": None if untrained or brought else picked.step,
        "new_accuracy_selection": own["new_accuracy"],
        "old_accuracy_selection": own["old_accuracy"],
        "weight_norm": distance(base, source.weights(picked.step)),
        "matchings": {
            m.name: {
                "by": m.by,
                "at": m.at,
                "reached": picks[m].reached,
                "as_primary": picks[m].step == picked.step,  # the same checkpoint, which stage `evaluate` measures
                "by_learning_rate": by_rate[m],
            }
            for m in wanted
        },
    }
    write_json(f"reports/cells/match/{arm}/{seed}.json", record)


def _run_folder(arm: str, seed: str, rate: float) -> Path:
    return Path(f"models/runs/{arm}/{seed}/{rate}")


def _curves(arm: str, seed: str, rates: Sequence[float]) -> dict[float, list[CurveRow]]:
    return read_curves(Path(f"reports/cells/finetune/{arm}/{seed}"), rates)


def _numbers(rows: list[CurveRow], matching: Matching, confirm: int) -> dict[str, float | bool]:
    picked = pick(rows, matching, confirm)
    row = {column: picked.row[column] for column in _COLUMNS}
    return {"reached": picked.reached, "step": picked.step, "furthest": picked.furthest} | row


def _refuse_shortcut_levels(levels: tuple[float, ...], new_task: str) -> None:
    shortcuts = read_json("data/tasks.json")["new_tasks"][new_task]["shortcuts"]
    name, score = max(shortcuts.items(), key=lambda item: item[1])
    for level in levels:
        if level <= score:
            raise Invalid(f"match.levels: {level} must be above {score:.3f}, which '{name}' scores on {new_task}")


def _scores(
    base_folder: Path, source: Source, steps: set[int], new_task: str, device: str
) -> dict[int, dict[str, float]]:
    """What a training curve would say of models that no training has scored, by step."""
    import torch  # heavy, and needed for untrained arms only

    from stages.learning.probes import Probe
    from stages.pipeline.checkpoints import load_model
    from stages.tasks.examples import read_examples, read_prompts

    torch.set_num_threads(1)  # two would mostly wait for each other in a model this small
    model = load_model(base_folder, device=device)
    old = read_examples(Path("data/old/selection.parquet"))
    new = read_prompts(Path("data/new") / new_task / "selection.parquet")
    probe = Probe.of(model, old, new)
    scored = {}
    for step in sorted(steps):
        set_weights(model, source.weights(step))
        measured = probe.measure(model) | {"gradient_steps": 0.0}
        scored[step] = {column: measured[column] for column in _COLUMNS}
    return scored


if __name__ == "__main__":
    run("match", ("arm", "seed"), main)
