"""What the gradient steps of each arm were like: from the records of every step, before the pick and behind it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.statistics.cells import Cells, mean_of_defined

MEASURES = ("gradient_norm", "update_norm", "entropy", "clip_fraction", "reward")


def table_of_steps(root: Path, cells: Cells, clip: float) -> list[dict[str, Any]]:
    """By arm that trains, at the learning rate of the contrasts, means over its seeds; none of runs without records.

    Args:
        root: folder of the cells.
        clip: norm to which gradients are clipped.

    Returns:
        arm; of the steps up to the picked checkpoint (`to_pick`) and of those behind it (`behind`): the mean of each of
        `MEASURES` that the trainer says something of, and the share of steps whose gradient was clipped.
    """
    found = []
    for arm in cells.arms:
        parts: dict[str, list[Mapping[str, float | None]]] = {"to_pick": [], "behind": []}
        for seed in cells.seeds:
            match = cells.record("match", arm, seed)
            path = root / "steps" / arm / seed / f"{match['learning_rate']}.csv"
            if match["step"] is None or not path.is_file():
                continue
            steps = pd.read_csv(path)
            before = steps["step"] <= match["step"]
            for name, part in (("to_pick", steps[before]), ("behind", steps[~before])):
                parts[name].append(_means(pd.DataFrame(part), clip))
        if parts["to_pick"]:
            found.append({"arm": arm} | {name: _over_seeds(entries) for name, entries in parts.items()})
    return found


def _means(steps: pd.DataFrame, clip: float) -> dict[str, float | None]:
    means = {name: _mean(steps[name]) for name in MEASURES}
    return means | {"clipped": _mean((steps["gradient_norm"] > clip).astype(float))}


def _mean(column: Any) -> float | None:
    defined = column.dropna()
    return float(defined.mean()) if len(defined) else None


def _over_seeds(entries: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {name: mean_of_defined([entry[name] for entry in entries]) for name in (*MEASURES, "clipped")}
