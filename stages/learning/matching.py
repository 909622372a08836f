"""Picking one checkpoint of a run, so that arms are compared at equal skill in the new task.

The rule, the same for every arm and frozen before the runs: the first checkpoint whose new-task accuracy on
    the selection split, and that of the next `confirm` checkpoints, is at least `level`. A single lucky
    checkpoint is thus not picked, and since the measured comparison uses other splits, what luck remains does
    not flatter any arm. A run that never gets there is recorded as not reached, with its last checkpoint; it
    is not replaced by another run.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from stages.learning.settings import CurveRow

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pick:
    """A checkpoint of a run: its row of the curve, and whether it (and its confirmers) reached the level."""

    reached: bool
    row: CurveRow

    @property
    def step(self) -> int:
        return int(self.row["step"])


def rule(confirm: int) -> str:
    """The rule of `pick` in words, for the record."""
    return f"first checkpoint whose new-task accuracy, and that of the next {confirm}, is at least the level"


def read_curve(path: Path) -> dict[float, list[CurveRow]]:
    """A training curve as learning rate (in grid order) -> rows by step, the base (step 0) first."""
    curves: dict[float, list[CurveRow]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            row = {name: float(value) for name, value in line.items() if name not in ("arm", "seed")}
            curves.setdefault(row.pop("learning_rate"), []).append(row)
    return curves


def pick(rows: list[CurveRow], level: float, confirm: int) -> Pick:
    """Apply the rule to the rows of one run; step 0 is the base and is never picked."""
    trained = sorted((row for row in rows if row["step"] > 0), key=lambda row: row["step"])
    above = [row["new_accuracy"] >= level for row in trained]
    for first in range(len(trained) - confirm):
        if all(above[first : first + confirm + 1]):
            return Pick(True, trained[first])
    return Pick(False, trained[-1])


def read_checkpoint(path: Path, step: int) -> Weights:
    """Weights of one checkpoint from a run's `lr<k>.safetensors`, by parameter name."""
    prefix = f"{step:06d}/"
    with safe_open(path, framework="np") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}


def moved_as_far(base: Weights, direction: Weights, reference: Weights) -> Weights:
    """The base moved along `direction` - base, each tensor by the norm of `reference` - base."""
    moved = {}
    for name, weight in base.items():
        along = direction[name].astype(np.float64) - weight
        far = np.linalg.norm(reference[name].astype(np.float64) - weight)
        length = np.linalg.norm(along)
        moved[name] = (weight + along * (far / length if length > 0 else 0.0)).astype(weight.dtype)
    return moved


def distance(base: Weights, weights: Weights) -> float:
    """Euclidean norm of the whole change."""
    return float(np.sqrt(sum(np.square(weights[n].astype(np.float64) - base[n]).sum() for n in base)))
