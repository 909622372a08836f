"""Arms against arms, paired over seeds: the numbers of reports/statistics.json.

The unit is the pair (base seed, fine-tuning seed); the arms of a seed share the base, the prompts and their
order, so a contrast is the mean of within-seed differences. A pair counts when the circuit of its base works in
place (a circuit that does not cannot say what fine-tuning keeps of it), both arms reached the matching level and
both have the measure; every pair that does not count is listed with its reason. The hypotheses, contrasts of
the primary measure (H1, H2, ...), form one family for Holm's correction. Further contrasts (D1, D2, ...) describe,
controls (C1, C2, ...) say whether the experiment could have shown anything and answer no question, and secondary
measures describe; none of these is corrected.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stages.statistics.cells import BASE, Cells
from stages.statistics.hierarchical import hierarchical_interval, paired_outcomes
from stages.statistics.paired import (
    bootstrap_interval,
    detectable_difference,
    equivalence_p,
    holm,
    power_note,
    provable_margin,
    resolution_note,
    sign_flip_p,
    smallest_sign_flip_p,
    t_interval,
)
from stages.statistics.primary import base_measure

PAIRS = ("contrasts", "described", "controls")  # parts of the plan that are (arm, reference) pairs


@dataclass(frozen=True)
class Plan:
    """What is compared, fixed before the results.

    Attributes:
        primary: measure, "<stage>.<dotted path in its record>".
        secondary: further measures.
        base_faithfulness: smallest faithfulness of a base's circuit in place, by the score of the primary measure, at
            which the seed counts.
        contrasts: (arm, reference) pairs, the hypotheses; their order names them H1, H2, ...
        described: the same of contrasts that describe, named D1, D2, ...
        controls: the same of controls, named C1, C2, ...
        confidence: coverage of intervals.
        alpha: level of tests.
        power: share of experiments that must detect a difference which counts as detectable.
        equivalence_margin: largest difference of the primary measure that counts as none.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    primary: str
    secondary: tuple[str, ...]
    base_faithfulness: float
    contrasts: tuple[tuple[str, str], ...]
    described: tuple[tuple[str, str], ...]
    controls: tuple[tuple[str, str], ...]
    confidence: float
    alpha: float
    power: float
    equivalence_margin: float
    resamples: int
    seed: int

    @property
    def named(self) -> tuple[tuple[str, str, str], ...]:
        """Name, arm and reference of every hypothesis, then of what describes, then of every control."""
        return tuple(
            (f"{letter}{number}", arm, reference)
            for letter, pairs in (("H", self.contrasts), ("D", self.described), ("C", self.controls))
            for number, (arm, reference) in enumerate(pairs, start=1)
        )


def compare(cells: Cells, plan: Plan) -> dict[str, Any]:
    """The contrasts' part of statistics.json.

    Args:
        cells, plan: all records, and what is compared.
    """
    measures = (plan.primary, *plan.secondary)
    left_out = left_out_bases(cells, plan)
    contrasts = [
        contrast(cells, plan, measure, name, arm, reference, left_out)
        for measure in measures
        for name, arm, reference in plan.named
    ]
    planned = contrasts[: len(plan.contrasts)]  # of the primary measure
    for entry, adjusted in zip(planned, holm([entry["p"] for entry in planned]), strict=True):
        entry["p_holm"] = adjusted
    return {
        "unit": "pair (base seed, fine-tuning seed)",
        "n_pairs": len(cells.seeds) - len(left_out),
        "bases_left_out": [{"seed": seed, "faithfulness": value} for seed, value in left_out.items()],
        "plan": asdict(plan)
        | {key: [list(pair) for pair in getattr(plan, key)] for key in PAIRS}
        | {"secondary": list(plan.secondary)},
        "measures": {
            measure: {model: describe(cells, plan, measure, model, left_out) for model in cells.models}
            for measure in measures
        },
        "contrasts": contrasts,
        "family": [{key: entry[key] for key in ("name", "p", "p_holm")} for entry in planned],
        "reach": {
            arm: {"reached": sum(cells.reached(arm, seed) for seed in cells.seeds), "of": len(cells.seeds)}
            for arm in cells.arms
        },
        "learning_rates": {arm: by_learning_rate(cells, arm) for arm in cells.arms},
        "power_note": _power_note(planned, len(planned), plan),
    }


def _power_note(planned: Sequence[Mapping[str, Any]], family: int, plan: Plan) -> str:
    """What the first contrast's pairs can show, by counting and at their spread."""
    if not planned:
        return power_note(0, plan.alpha, 0)
    first = planned[0]
    note = power_note(first["n"], plan.alpha, family)
    if first["sd"] is not None:
        note += " " + resolution_note(first["n"], first["sd"], plan.alpha, plan.power, first["name"])
    return note


def left_out_bases(cells: Cells, plan: Plan) -> dict[str, float | None]:
    """Seeds that no contrast counts -> faithfulness of the base's circuit there (`primary.base_measure`), None where
    it has no circuit."""
    found, measure = {}, base_measure(plan.primary)
    for seed in cells.seeds:
        identifiable = cells.record("circuit", BASE, seed)["identifiable"]
        value = cells.value(measure, BASE, seed) if identifiable else None
        if value is None or value < plan.base_faithfulness:
            found[seed] = value
    return found


def describe(
    cells: Cells, plan: Plan, measure: str, model: str, left_out: Mapping[str, float | None]
) -> dict[str, Any]:
    """Mean, spread and interval of a measure over the seeds at which the model counts.

    Args:
        cells, plan: all records, and what is compared.
        measure: "<stage>.<dotted path in its record>".
        model: base or arm.
        left_out: what `left_out_bases` gives.
    """
    values, excluded = {}, []
    for seed in cells.seeds:
        value = cells.value(measure, model, seed)
        if seed in left_out:
            excluded.append({"seed": seed, "reason": "base left out", "value": value})
        elif model != BASE and not cells.reached(model, seed):
            excluded.append({"seed": seed, "reason": "level not reached", "value": value})
        elif value is None:
            excluded.append({"seed": seed, "reason": "undefined", "value": None})
        else:
            values[seed] = value
    x = list(values.values())
    return {
        "n": len(x),
        "mean": float(np.mean(x)) if x else None,
        "sd": float(np.std(x, ddof=1)) if len(x) > 1 else None,
        "ci": _pair(t_interval(x, plan.confidence)),
        "values": values,
        "excluded": excluded,
    }


def contrast(
    cells: Cells,
    plan: Plan,
    measure: str,
    name: str,
    arm: str,
    reference: str,
    left_out: Mapping[str, float | None],
) -> dict[str, Any]:
    """One contrast of one measure: arm minus reference, without the seeds that `left_out_bases` names."""
    values: dict[str, float] = {}
    sides: list[tuple[float, float]] = []
    excluded: list[dict[str, Any]] = []
    for seed in cells.seeds:
        pair = [cells.value(measure, model, seed) for model in (arm, reference)]
        unreached = [model for model in (arm, reference) if not cells.reached(model, seed)]
        undefined = [model for model, value in zip((arm, reference), pair, strict=True) if value is None]
        if seed in left_out:
            excluded.append({"seed": seed, "reason": "base left out", "models": [BASE], "faithfulness": left_out[seed]})
        elif unreached:
            excluded.append({"seed": seed, "reason": "level not reached by", "models": unreached})
        elif undefined:
            excluded.append({"seed": seed, "reason": "undefined for", "models": undefined})
        else:
            first, second = (float(value) for value in pair if value is not None)
            values[seed] = first - second
            sides.append((first, second))
    x = list(values.values())
    sd = float(np.std(x, ddof=1)) if len(x) > 1 else None
    resolved = (len(x), sd, plan.alpha, plan.power) if sd is not None and measure == plan.primary else None
    return {
        "name": name,
        "measure": measure,
        "arm": arm,
        "reference": reference,
        "n": len(x),
        "difference": float(np.mean(x)) if x else None,
        "sd": sd,
        "arm_mean": float(np.mean([first for first, _ in sides])) if sides else None,
        "reference_mean": float(np.mean([second for _, second in sides])) if sides else None,
        "values": values,
        "excluded": excluded,
        "ci": _pair(t_interval(x, plan.confidence)),
        "ci_bootstrap": _pair(bootstrap_interval(x, plan.confidence, plan.resamples, plan.seed)),
        "ci_hierarchical": _pair(_hierarchical(cells, plan, arm, reference, values))
        if measure == plan.primary
        else None,
        "p": sign_flip_p(x),
        "p_holm": None,
        "p_equivalent": equivalence_p(x, plan.equivalence_margin) if measure == plan.primary else None,
        "detectable": detectable_difference(*resolved) if resolved else None,
        "provable_margin": provable_margin(*resolved) if resolved else None,
        "smallest_possible_p": smallest_sign_flip_p(len(x)),
    }


def _hierarchical(
    cells: Cells, plan: Plan, arm: str, reference: str, seeds: Collection[str]
) -> tuple[float, float] | None:
    """Hierarchical bootstrap interval of the primary measure; None unless all seeds have outcomes by example."""
    outcomes = [paired_outcomes(cells, plan.primary, arm, reference, seed) for seed in seeds]
    known = [entry for entry in outcomes if entry is not None]
    if len(known) < len(outcomes):
        return None
    return hierarchical_interval(known, plan.confidence, plan.resamples, plan.seed)


def by_learning_rate(cells: Cells, arm: str) -> dict[str, Any]:
    """Old-task accuracy (selection split) where the arm reached the level, by learning rate of the grid; of an arm
    without training here, which has none, nothing."""
    found: dict[str, dict[str, Any]] = {}
    for seed in cells.seeds:
        match = cells.record("match", arm, seed)
        primary = match["matchings"][match["matching"]]
        rates: Mapping[str, Any] = {} if match["step"] is None else primary["by_learning_rate"]
        for rate, record in rates.items():
            entry = found.setdefault(rate, {"of": 0, "reached": 0, "values": {}})
            entry["of"] += 1
            if record["reached"]:
                entry["reached"] += 1
                entry["values"][seed] = record["old_accuracy"]
    for entry in found.values():
        entry["old_accuracy"] = float(np.mean(list(entry["values"].values()))) if entry["values"] else None
    return found


def _pair(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [float(bound) for bound in interval]
