"""The comparison at every matching: at several levels of the new task, at equal KL, at equal norm of the change, after
equally many steps; at the learning rate of the contrasts, and at any other.

The primary matching is the one that `contrasts` tests. All matchings describe here, the primary one among them: means
and t intervals over the seeds at which an arm got there and whose base counts, and the planned differences, paired in
the seed. Which runs get to a value is an outcome of training, so a comparison of those that do is a selection; a
matching that fewer than `LEAST_REACHED` of the runs reach is marked, controls that do not learn the task aside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from stages.measures.scores import ENDINGS
from stages.statistics.cells import Cells, Record, mean_of_defined
from stages.statistics.contrasts import Plan, left_out_bases
from stages.statistics.paired import t_interval

LEAST_REACHED = 0.95
OLD, NEW = "old_accuracy", "new_accuracy"
RETENTIONS = tuple(f"retention{ending}" for ending in ENDINGS.values())
MEASURES = (*RETENTIONS, OLD, NEW)  # of the evaluation split
CLOSENESS = ("new_accuracy", "kl_new", "weight_norm", "gradient_steps")  # of the picked checkpoint, selection split


def compare_matchings(cells: Cells, plan: Plan) -> list[dict[str, Any]]:
    """One entry for each matching, in the order of the match records: by accuracy, by KL, by norm, by steps."""
    return [_matching(cells, plan, name) for name in names_of_matchings(cells)]


def at_matching(cells: Cells, arm: str, seed: str, name: str, rate: str | None = None) -> Record | None:
    """What is known of the checkpoint that a matching picked at a learning rate: `circuit`, `circuit_by_ablation`, the
    scores of the whole model and of the new task; None where the run did not get there.

    Args:
        rate: as in the records; None: that of the contrasts.
    """
    match, found = cells.record("match", arm, seed), _picked(cells, arm, seed, name)
    own = f"{match['learning_rate']:g}"
    rate = own if rate is None else rate
    if not found["by_learning_rate"].get(rate, {"reached": False})["reached"]:
        return None
    if rate == own and found["as_primary"]:
        return cells.record("evaluate", arm, seed)
    return cells.record("matchings", arm, seed)["matchings"][name][rate]


def value(cells: Cells, arm: str, seed: str, name: str, measure: str, rate: str | None = None) -> float | None:
    """One of `MEASURES` of that checkpoint; None where there is none, or where the base has no circuit."""
    record = at_matching(cells, arm, seed, name, rate)
    if record is None:
        return None
    return ((record["circuit"] or {}) if measure in RETENTIONS else record).get(measure)


def _matching(cells: Cells, plan: Plan, name: str) -> dict[str, Any]:
    first = _picked(cells, cells.arms[0], cells.seeds[0], name)
    runs = [(arm, seed) for arm in cells.arms for seed in cells.seeds if _learns(cells, arm, seed)]
    reached = sum(_picked(cells, arm, seed, name)["reached"] for arm, seed in runs)
    share = reached / len(runs) if runs else 0.0
    return {
        "name": name,
        "by": first["by"],
        "at": first["at"],
        "primary": name == cells.record("match", cells.arms[0], cells.seeds[0])["matching"],
        "reached": reached,
        "of": len(runs),
        "selected": share < LEAST_REACHED,
        "arms": {arm: _of_arm(cells, plan, arm, name) for arm in cells.arms},
        "contrasts": [
            {"name": contrast} | _difference(cells, plan, arm, reference, name)
            for contrast, arm, reference in plan.named
        ],
    }


def _learns(cells: Cells, arm: str, seed: str) -> bool:
    """Whether this run is meant to get anywhere: it is trained here, and no sham."""
    record = cells.record("match", arm, seed)
    return record["like"] is None and record["step"] is not None


def _of_arm(cells: Cells, plan: Plan, arm: str, name: str) -> dict[str, Any]:
    reached = [seed for seed in cells.seeds if _picked(cells, arm, seed, name)["reached"]]
    entry: dict[str, Any] = {"reached": len(reached), "of": len(cells.seeds)}
    for measure in MEASURES:
        values = {seed: value(cells, arm, seed, name, measure) for seed in _seeds(cells, plan)}
        entry[measure] = summary({seed: v for seed, v in values.items() if v is not None}, plan.confidence)
    at_rate = [_at_rate(cells, arm, seed, name) for seed in reached]
    entry["picked"] = {column: mean_of_defined([float(row[column]) for row in at_rate]) for column in CLOSENESS}
    return entry


def _difference(cells: Cells, plan: Plan, arm: str, reference: str, name: str) -> dict[str, Any]:
    """Arm minus reference, of the retention and of the old task, over the seeds at which both have the number."""
    entry: dict[str, Any] = {"arm": arm, "reference": reference}
    for measure in MEASURES:
        pairs = {
            seed: [value(cells, model, seed, name, measure) for model in (arm, reference)]
            for seed in _seeds(cells, plan)
        }
        entry[measure] = summary(
            {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}, plan.confidence
        )
    return entry


def summary(values: Mapping[str, float], confidence: float) -> dict[str, Any]:
    """n, mean and t interval of numbers by seed, and the numbers."""
    x = list(values.values())
    interval = t_interval(x, confidence)
    return {
        "n": len(x),
        "mean": mean_of_defined(x),
        "ci": None if interval is None else list(interval),
        "values": dict(values),
    }


def _seeds(cells: Cells, plan: Plan) -> list[str]:
    """The seeds that count in the contrasts, as far as that is the base's doing."""
    left_out = left_out_bases(cells, plan)
    return [seed for seed in cells.seeds if seed not in left_out]


def names_of_matchings(cells: Cells) -> list[str]:
    """All matchings, increasing within accuracy, KL, norm and steps."""
    found = cells.record("match", cells.arms[0], cells.seeds[0])["matchings"]
    order = {column: place for place, column in enumerate(CLOSENESS)}
    return sorted(found, key=lambda name: (order[found[name]["by"]], found[name]["at"]))


def _picked(cells: Cells, arm: str, seed: str, name: str) -> dict[str, Any]:
    return cells.record("match", arm, seed)["matchings"][name]


def _at_rate(cells: Cells, arm: str, seed: str, name: str) -> dict[str, Any]:
    """The picked checkpoint's row of the curve at the learning rate of the matching."""
    rate = cells.record("match", arm, seed)["learning_rate"]
    return _picked(cells, arm, seed, name)["by_learning_rate"][f"{rate:g}"]


def long_table(entries: Sequence[Mapping[str, Any]], arms: Sequence[str], kept: str = RETENTIONS[0]) -> pd.DataFrame:
    """by, at, selected, arm, seed, retention, old_accuracy: one row for each number of `compare_matchings`, and one
    without numbers where an arm has none at a matching.

    Args:
        entries, arms: what `compare_matchings` gives, and the arms.
        kept: which of `RETENTIONS` the column is.
    """
    rows = []
    for entry in entries:
        key = {column: entry[column] for column in ("by", "at", "selected")}
        for arm in arms:
            found = entry["arms"][arm]
            values = {"retention": found[kept]["values"], OLD: found[OLD]["values"]}
            for seed in dict.fromkeys([*values["retention"], *values[OLD]]) or [None]:
                rows.append(key | {"arm": arm, "seed": seed} | {m: values[m].get(seed) for m in values})
    columns = ["by", "at", "selected", "arm", "seed", "retention", OLD]
    return pd.DataFrame(rows, columns=columns).astype({"retention": "float64", OLD: "float64"})
