"""Picking checkpoints of a run, so that arms are compared at equal skill in the new task, or at an equal distance.

A matching is a column of the training curve and a value of it, frozen before the runs and the same for every arm. Of
new-task accuracy on the selection split: the first checkpoint at which it, and that of the next `confirm` checkpoints,
is at least the value. A single lucky checkpoint is thus not picked, and since the measured comparison uses other
splits, what luck remains does not flatter any arm. No checkpoint is picked while the learning rate still rises: there
the size of a step is set by the warm-up, not by the arm. Of the distances, KL(base || model) on new-task prompts and
the norm of the weight change, and of the budget, the number of gradient steps: the first checkpoint at or above the
value. A run that never gets there is recorded as not reached, with its last checkpoint; it is not replaced by another.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.learning.checkpoints import LazyWeights, Weights
from stages.learning.settings import NO_RATE, CurveRow

ACCURACY, KL, NORM, STEPS = "new_accuracy", "kl_new", "weight_norm", "gradient_steps"  # columns of a training curve
_SHORT = {ACCURACY: "accuracy", KL: "kl", NORM: "norm", STEPS: "steps"}


@dataclass(frozen=True)
class Matching:
    """What arms are made equal in.

    Attributes:
        by: column of the training curve.
        at: its value: a share, nats, a Euclidean norm, or a number of steps.
    """

    by: str
    at: float

    @property
    def name(self) -> str:
        """A key for records and files, for example accuracy_0_95; without a dot, which parts the keys of a measure."""
        return f"{_SHORT[self.by]}_{self.at:g}".replace(".", "_")


def matchings(
    levels: Sequence[float], kl: Sequence[float], norm: Sequence[float], steps: Sequence[int]
) -> list[Matching]:
    """All matchings: by accuracy, by KL, by norm, by budget, each in increasing order."""
    kinds = ((ACCURACY, levels), (KL, kl), (NORM, norm), (STEPS, steps))
    return [Matching(by, float(at)) for by, values in kinds for at in sorted(values)]


@dataclass(frozen=True)
class Pick:
    """A checkpoint of a run.

    Attributes:
        reached: whether it (and its confirmers) are at the value; if not, it is the last one.
        row: its row of the curve.
        furthest: the largest value of the run, whether confirmed or not.
    """

    reached: bool
    row: CurveRow
    furthest: float

    @property
    def step(self) -> int:
        return int(self.row["step"])


def after_warmup(warmup: int) -> str:
    """What is added to the words of a rule."""
    return f", after {warmup} steps of warm-up" if warmup else ""


def rule(confirm: int) -> str:
    """The rule of `pick` for accuracy in words, for the record."""
    return f"first checkpoint whose new-task accuracy, and that of the next {confirm}, is at least the level"


def read_curves(folder: Path, learning_rates: Sequence[float]) -> dict[float, list[CurveRow]]:
    """The training curves of an arm and seed.

    Args:
        folder: has a file for each learning rate; those of others than these may be left over and are not read.
        learning_rates: in which order.

    Returns:
        learning rate, or NO_RATE where all are one curve -> rows by step, the base (step 0) first; NaN where a step has
        no such value.
    """
    curves: dict[float, list[CurveRow]] = {}
    for rate in learning_rates:
        with (folder / f"{rate}.csv").open(newline="", encoding="utf-8") as file:
            lines = [{key: line[key] for key in line if key not in ("arm", "seed")} for line in csv.DictReader(file)]
        rows: list[CurveRow] = [{key: float(value or "nan") for key, value in line.items()} for line in lines]
        curves[rate if rows[0]["learning_rate"] else NO_RATE] = rows
    return curves


def pick(rows: Sequence[CurveRow], matching: Matching, confirm: int, warmup: int = 0) -> Pick:
    """Apply the rule to the rows of one run; step 0 is the base and is never picked.

    Args:
        rows: of the training curve.
        matching: what to reach.
        confirm: so many next checkpoints must be at the value, too. Not asked of the distances and the budget: they
            are measured on the weights, or over whole distributions, or counted, and do not get there by luck.
        warmup: steps that are not picked from, nor counted in `furthest`; if there are no others, the last one is.
    """
    trained = _after(rows, warmup)
    above = [row[matching.by] >= matching.at for row in trained]
    furthest = float(max(row[matching.by] for row in trained))
    needed = confirm + 1 if matching.by == ACCURACY else 1
    for first in range(len(trained) - needed + 1):
        if all(above[first : first + needed]):
            return Pick(True, trained[first], furthest)
    return Pick(False, trained[-1], furthest)


def pick_as_far(rows: Sequence[CurveRow], reference: Pick, warmup: int = 0) -> Pick:
    """The first checkpoint whose weights have changed by at least as much as those of another run's pick; not reached
    where that one is not."""
    found = pick(rows, Matching(NORM, reference.row[NORM]), 0, warmup)
    return Pick(found.reached and reference.reached, found.row, found.furthest)


def as_it_is(rows: Sequence[CurveRow], matching: Matching, primary: Matching) -> Pick:
    """The one model of an arm that was trained elsewhere: at the primary matching, and at no other."""
    return Pick(matching == primary, rows[-1], rows[-1][matching.by])


def _after(rows: Sequence[CurveRow], warmup: int) -> list[CurveRow]:
    trained = sorted((row for row in rows if row["step"] > 0), key=lambda row: row["step"])
    return [row for row in trained if row["step"] > warmup] or trained[-1:]


def moved_as_far(base: Weights, direction: Weights, reference: Weights) -> Weights:
    """The base moved along `direction` - base, each tensor by the norm of `reference` - base."""

    def moved(name: str) -> np.ndarray:
        weight = base[name]
        along = direction[name].astype(np.float64) - weight
        far = np.linalg.norm(reference[name].astype(np.float64) - weight)
        length = np.linalg.norm(along)
        return (weight + along * (far / length if length > 0 else 0.0)).astype(weight.dtype)

    return LazyWeights(base, moved)


def distance(base: Weights, weights: Weights) -> float:
    """Euclidean norm of the whole change."""
    return float(np.sqrt(sum(np.square(weights[n].astype(np.float64) - base[n]).sum() for n in base)))
