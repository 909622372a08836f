"""Stage `match` (arm, seed): pick the checkpoints at which the arms are compared.

The primary one, at the frozen new-task level and one learning rate, is written as a model folder, which the stages
below read. The ones of the other matchings (see `stages/learning/matching.py`) and learning rates are written as bare
weights, each once, with an index that says which matching picked which; stage `matchings` tests the circuit in them. Of
an arm with adapters both hold these alone, in PEFT's format, whose base is the base. The record holds what every
matching picked at every learning rate.

Shams learn nothing of the new task and are moved as far as another arm at its level: `noise`, each tensor exactly so
far along a random direction, and an arm that trains, to its first checkpoint that is as far as a whole.

An imported arm has one model, which is picked as it is: no level is asked of it, and it is at no other matching.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    after_warmup,
    as_it_is,
    distance,
    matchings,
    moved_as_far,
    pick,
    pick_as_far,
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
        run: folder of the run at a learning rate.
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
    warmup, new_task = cell.params("finetune.common.warmup_steps"), cell.params("new_task")
    wanted = matchings(settings.levels, settings.kl, settings.norm, settings.steps)
    primary = Matching(ACCURACY, settings.level)
    _refuse_shortcut_levels(settings.levels, new_task)

    base_folder, target = Path(f"models/base/{seed}"), Path(f"models/{arm}/{seed}")
    base = stored_weights(*sorted(base_folder.glob("*.safetensors")))
    curves = _curves(arm, seed, rates)
    brought = (_run_folder(arm, seed, rate) / IMPORTED).is_file()
    untrained = NO_RATE in curves and not brought
    like = settings.like if arm in settings.shams else arm
    direction, of_like = None, curves if like == arm else _curves(like, seed, rates)
    if untrained:
        last = int(max(row["step"] for row in curves[NO_RATE]))
        direction, curves = read_checkpoint(_run_folder(arm, seed, rate), last, base), of_like
    if NO_RATE in curves:  # imported, the arm itself or the one that noise imitates: one model, whatever the rate
        rates = [rate]
        picks = {(m, rate): as_it_is(curves[NO_RATE], m, primary) for m in wanted}
    else:
        picks = {(m, r): pick(curves[r], m, confirm, warmup) for m in wanted for r in rates}
    if like != arm and not untrained:
        for m, r in (key for key in picks if key[0].by == ACCURACY):  # no level is asked of it
            there = (
                as_it_is(of_like[NO_RATE], m, primary) if NO_RATE in of_like else pick(of_like[r], m, confirm, warmup)
            )
            picks[m, r] = pick_as_far(curves[r], there, warmup)
    source = {r: Source(base_folder, base, _run_folder(like if untrained else arm, seed, r), direction) for r in rates}
    picked = picks[primary, rate]

    with replacing_directory(target) as folder:
        for file in sorted(base_folder.glob("*.json")):  # config and tokenizer
            if not file.name.endswith(".index.json"):  # of a base in several files
                shutil.copyfile(file, folder / file.name)
        source[rate].save(picked.step, folder, MODEL_FILE, ADAPTER_WEIGHTS)

    others = {key: p.step for key, p in picks.items() if p.reached and (key[1], p.step) != (rate, picked.step)}
    with replacing_directory(f"models/matched/{seed}/{arm}") as folder:
        _write_others(folder, source, others)

    if untrained:
        scored = _scores(base_folder, source, {(r, p.step) for (_, r), p in picks.items()}, new_task, available.device)
        rows = {key: scored[key[1], p.step] for key, p in picks.items()}
    else:
        rows = {key: {column: p.row[column] for column in _COLUMNS} for key, p in picks.items()}
    own = rows[primary, rate]
    record = {
        "arm": arm,
        "seed": int(seed),
        "reached": picked.reached,  # of a sham: whether the arm that it imitates did, and it went as far
        "rule": _rule(arm, like, brought, untrained, confirm, warmup),
        "like": None if like == arm else like,
        "matching": primary.name,
        "level": settings.level,
        "learning_rate": rate,
        "step": None if untrained or brought else picked.step,
        "new_accuracy_selection": own["new_accuracy"],
        "old_accuracy_selection": own["old_accuracy"],
        "overshoot_selection": own["new_accuracy"] - settings.level,
        "weight_norm": distance(base, source[rate].weights(picked.step)),
        "matchings": {
            m.name: {
                "by": m.by,
                "at": m.at,
                "reached": picks[m, rate].reached,
                "as_primary": picks[m, rate].step == picked.step,  # the same checkpoint, which `evaluate` measures
                "by_learning_rate": {
                    f"{r:g}": {"reached": picks[m, r].reached}
                    | ({} if untrained or brought else {"step": picks[m, r].step, "furthest": picks[m, r].furthest})
                    | rows[m, r]
                    for r in rates
                },
            }
            for m in wanted
        },
    }
    write_json(f"reports/cells/match/{arm}/{seed}.json", record)


def _write_others(folder: Path, source: Mapping[float, Source], steps: Mapping[tuple[Matching, float], int]) -> None:
    """The checkpoints that matchings picked at learning rates, and index.json: matching -> rate -> file."""
    index: dict[str, dict[str, str]] = {}
    for rate, step in sorted({(rate, step) for (_, rate), step in steps.items()}):
        (folder / f"{rate:g}").mkdir(exist_ok=True)
        name = checkpoint_file(folder, step).name
        source[rate].save(step, folder / f"{rate:g}", whole=name, adapters=name)
    for (matching, rate), step in steps.items():
        index.setdefault(matching.name, {})[f"{rate:g}"] = f"{rate:g}/{checkpoint_file(folder, step).name}"
    write_json(folder / "index.json", index)


def _rule(arm: str, like: str, brought: bool, untrained: bool, confirm: int, warmup: int) -> str:
    if brought:
        return "imported: the model as it is, no level is asked of it"
    if untrained:
        return f"each tensor moved as far as in the picked checkpoint of '{like}', along a random direction"
    if like != arm:
        return f"first checkpoint that has moved as far as the picked one of '{like}'" + after_warmup(warmup)
    return rule(confirm) + after_warmup(warmup)


def _run_folder(arm: str, seed: str, rate: float) -> Path:
    return Path(f"models/runs/{arm}/{seed}/{rate}")


def _curves(arm: str, seed: str, rates: Sequence[float]) -> dict[float, list[CurveRow]]:
    return read_curves(Path(f"reports/cells/finetune/{arm}/{seed}"), rates)


def _refuse_shortcut_levels(levels: tuple[float, ...], new_task: str) -> None:
    shortcuts = read_json("data/tasks.json")["new_tasks"][new_task]["shortcuts"]
    name, score = max(shortcuts.items(), key=lambda item: item[1])
    for level in levels:
        if level <= score:
            raise Invalid(f"match.levels: {level} must be above {score:.3f}, which '{name}' scores on {new_task}")


def _scores(
    base_folder: Path, source: Mapping[float, Source], picked: set[tuple[float, int]], new_task: str, device: str
) -> dict[tuple[float, int], dict[str, float]]:
    """What a training curve would say of models that no training has scored, by learning rate and step."""
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
    for rate, step in sorted(picked):
        set_weights(model, source[rate].weights(step))
        measured = probe.measure(model) | {"gradient_steps": 0.0}
        scored[rate, step] = {column: measured[column] for column in _COLUMNS}
    return scored


if __name__ == "__main__":
    run("match", ("arm", "seed"), main)
