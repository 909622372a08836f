"""Pick the checkpoint of an arm at the frozen new-task level and write it as a model folder."""

import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from stages.learning.matching import Pick, distance, moved_as_far, pick, read_checkpoint, read_curve, rule
from stages.pipeline.files import read_json, replacing_directory, write_json
from stages.pipeline.stage import Cell, Invalid, run

MODEL_FILE = "model.safetensors"


def main(cell: Cell) -> None:
    arm, seed = cell.item["arm"], cell.item["seed"]
    settings = cell.params("match")
    level, rate, confirm = settings.level, settings.learning_rate, settings.confirm
    new_task = cell.params("new_task")
    _refuse_shortcut_level(level, new_task)

    base_folder, target = Path(f"models/base/{seed}"), Path(f"models/{arm}/{seed}")
    base = load_file(base_folder / MODEL_FILE)
    curves = read_curve(Path(f"reports/cells/finetune/{arm}/{seed}.csv"))
    untrained = set(curves) == {0.0}
    source = settings.noise_like if untrained else arm
    source_curves = read_curve(Path(f"reports/cells/finetune/{source}/{seed}.csv"))
    index, picked = _at_rate(source_curves, rate, level, confirm)
    weights = read_checkpoint(Path(f"models/runs/{source}/{seed}/lr{index}.safetensors"), picked.step)
    if untrained:
        last = int(max(row["step"] for row in curves[0.0]))
        direction = read_checkpoint(Path(f"models/runs/{arm}/{seed}/lr0.safetensors"), last)
        weights = moved_as_far(base, direction, weights)
    if weights.keys() != base.keys():
        raise RuntimeError(f"checkpoints of '{source}' and base {seed} hold different parameters")

    with replacing_directory(target) as folder:
        for file in sorted(base_folder.glob("*.json")):  # config and tokenizer
            shutil.copyfile(file, folder / file.name)
        save_file({name: weights[name] for name in base}, folder / MODEL_FILE, metadata={"format": "pt"})

    if untrained:
        text = f"each tensor moved as far as in the picked checkpoint of '{source}', along a random direction"
        old, new = _selection_accuracies(target, new_task)
    else:
        text, old, new = rule(confirm), picked.row["old_accuracy"], picked.row["new_accuracy"]
    record = {
        "arm": arm,
        "seed": int(seed),
        "reached": picked.reached,  # of an untrained arm: whether the arm that it imitates did
        "rule": text,
        "like": source if untrained else None,
        "level": level,
        "learning_rate": rate,
        "step": None if untrained else picked.step,
        "new_accuracy_selection": new,
        "old_accuracy_selection": old,
        "weight_norm": distance(base, weights),
        "by_learning_rate": {}
        if untrained
        else {f"{key:g}": _numbers(pick(rows, level, confirm)) for key, rows in curves.items()},
    }
    write_json(f"reports/cells/match/{arm}/{seed}.json", record)


def _at_rate(curves: dict[float, Any], rate: float, level: float, confirm: int) -> tuple[int, Pick]:
    for index, (trained_rate, rows) in enumerate(curves.items()):
        if math.isclose(trained_rate, rate, rel_tol=1e-6):
            return index, pick(rows, level, confirm)
    grid = ", ".join(f"{entry:g}" for entry in curves)
    raise Invalid(f"match.learning_rate = {rate:g}: must be one of finetune.common.learning_rates ({grid})")


def _numbers(picked: Pick) -> dict[str, float | bool]:
    return {"reached": picked.reached} | picked.row | {"step": picked.step}


def _refuse_shortcut_level(level: float, new_task: str) -> None:
    shortcuts = read_json("data/tasks.json")["new_tasks"][new_task]["shortcuts"]
    name, score = max(shortcuts.items(), key=lambda item: item[1])
    if level <= score:
        raise Invalid(f"match.level = {level}: must be above {score:.3f}, which '{name}' scores on {new_task}")


def _selection_accuracies(model_folder: Path, new_task: str) -> tuple[float, float]:
    import torch  # heavy, and needed for untrained arms only

    from stages.learning.probes import is_valid, last_log_probs
    from stages.pipeline.checkpoints import load_model
    from stages.tasks.examples import read_examples, read_prompts

    torch.set_num_threads(1)  # two would mostly wait for each other in a model this small
    model = load_model(model_folder)
    old = read_examples(Path("data/old/selection.parquet"))
    new = read_prompts(Path("data/new") / new_task / "selection.parquet")
    right_old = last_log_probs(model, old.input_ids).argmax(-1) == old.answer
    right_new = is_valid(last_log_probs(model, new.input_ids), new.valid)
    return right_old.double().mean().item(), right_new.double().mean().item()


if __name__ == "__main__":
    run("match", ("arm", "seed"), main)
