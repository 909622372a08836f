"""Every number of the report in one place: reports/summary.json.

The report is written from this alone. DVC shows nested dictionaries as metrics and passes over lists, so the
few numbers that experiments are compared by stand in dictionaries with stable keys, and tables stand in
lists.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.statistics.cells import BASE, Cells
from stages.statistics.contrasts import Plan, describe
from stages.statistics.wording import headline, verdict

_ALWAYS = ("evaluate.old_accuracy", "evaluate.new_accuracy")
_LAST = ("drift.weight_norm",)


def plan_of(statistics: Mapping[str, Any]) -> Plan:
    """The plan that statistics.json was made by."""
    plan = dict(statistics["plan"])
    plan["contrasts"] = tuple((arm, reference) for arm, reference in plan["contrasts"])
    plan["secondary"] = tuple(plan["secondary"])
    return Plan(**plan)


def summarise(
    cells: Cells, statistics: Mapping[str, Any], shortcuts: Mapping[str, float], names: Mapping[str, str]
) -> dict[str, Any]:
    """The numbers of the report.

    Args:
        cells: all records.
        statistics: statistics.json.
        shortcuts: what answers without the skill score in the new task, by name.
        names: model -> its name for people.
    """
    plan = plan_of(statistics)
    measures = tuple(dict.fromkeys((*_ALWAYS, plan.primary, *plan.secondary, *_LAST)))
    described = {model: {m: describe(cells, plan, m, model) for m in measures} for model in cells.models}
    primary = [entry for entry in statistics["contrasts"] if entry["measure"] == plan.primary]
    levels = {cells.record("match", arm, seed)["level"] for arm in cells.arms for seed in cells.seeds}
    level = levels.pop() if len(levels) == 1 else None
    shortcut = max(shortcuts.items(), key=lambda item: item[1]) if shortcuts else (None, None)
    first = primary[0] if primary else None
    return {
        "headline": {
            "sentence": headline(first, names, statistics["plan"], level) if first else "No contrast was planned.",
            "verdict": verdict(first, plan.alpha) if first else "no contrast",
        },
        "new_task": statistics["new_task"],
        "level": level,
        "shortcut": shortcut[1],
        "shortcut_name": shortcut[0],
        "n_pairs": statistics["n_pairs"],
        "power_note": statistics["power_note"],
        "base": _base(cells),
        "random_floor": random_floor(cells, plan.primary),
        "arms": {
            arm: dict(statistics["reach"][arm])
            | {key(m): described[arm][m]["mean"] for m in measures}
            | {f"{key(m)}_sd": described[arm][m]["sd"] for m in measures}
            for arm in cells.arms
        },
        "contrasts": {
            entry["name"]: {
                "arm": entry["arm"],
                "reference": entry["reference"],
                "n": entry["n"],
                "difference": entry["difference"],
                "ci_low": entry["ci"][0] if entry["ci"] else None,
                "ci_high": entry["ci"][1] if entry["ci"] else None,
                "p": entry["p"],
                "p_holm": entry["p_holm"],
                "verdict": verdict(entry, plan.alpha),
            }
            for entry in primary
        },
        "plan": [statistics["plan"]],
        "measures": list(measures),
        "table_contrasts": list(statistics["contrasts"]),
        "table_models": [
            {
                "model": model,
                "measures": {m: {k: described[model][m][k] for k in ("n", "mean", "sd")} for m in measures},
            }
            for model in cells.models
        ],
        "table_seeds": [
            {
                "model": model,
                "seed": seed,
                "reached": None if model == BASE else cells.reached(model, seed),
                "step": cells.record("match", model, seed).get("step") if model != BASE else None,
                "measures": {m: cells.value(m, model, seed) for m in measures},
            }
            for model in cells.models
            for seed in cells.seeds
        ],
        "table_circuits": [_circuit_tests(cells, model) for model in cells.models],
        "table_learning_rates": [
            {
                "arm": arm,
                "learning_rate": float(rate),
                "reached": e["reached"],
                "of": e["of"],
                "mean": e["old_accuracy"],
            }
            for arm in cells.arms
            for rate, e in sorted(statistics["learning_rates"][arm].items(), key=lambda item: float(item[0]))
        ],
        "not_identifiable": [
            {"model": model, "seed": seed}
            for model in cells.models
            for seed in cells.seeds
            if not cells.record("circuit", model, seed)["identifiable"]
        ],
        "unreached": [
            {"model": arm, "seed": seed} for arm in cells.arms for seed in cells.seeds if not cells.reached(arm, seed)
        ],
        "checks": checks(cells, primary, names),
    }


def key(measure: str) -> str:
    """A measure as a key of summary.json."""
    return measure.replace(".", "_")


def _base(cells: Cells) -> dict[str, float | None]:
    measures = {
        "old_accuracy": "evaluate.old_accuracy",
        "new_accuracy": "evaluate.new_accuracy",
        "circuit_size": "evaluate.circuit.size",
        "circuit_faithfulness": "evaluate.circuit.faithfulness",
    }
    found: dict[str, float | None] = {name: _mean(_base_values(cells, m)) for name, m in measures.items()}
    null = [value for seed in cells.seeds for value in _random(cells, seed, "faithfulness")]
    found["random_faithfulness"] = _mean(null)
    found["random_faithfulness_max"] = max(null, default=None)
    found["seeds"] = len(cells.seeds)
    return found


_INSPECTED = {
    "faithfulness": "completeness.nothing.faithfulness",
    "faithfulness_ld": "completeness.nothing.faithfulness_ld",
    "size": "minimality.size",
    "core": "minimality.core",
    "stand_ins": "minimality.stand_ins",
    "idle": "minimality.idle",
    "core_share": "minimality.core_share",
    "worst_gap": "completeness.worst_found.gap",
    "cpr": "size_curve.cpr",
    "cmd": "size_curve.cmd",
    "enough": "size_curve.enough",
}


def _circuit_tests(cells: Cells, model: str) -> dict[str, Any]:
    """Is the base's circuit minimal, complete and of the right size in this model? Means over the seeds that count."""
    seeds = [seed for seed in cells.seeds if model == BASE or cells.reached(model, seed)]
    found: dict[str, Any] = {"model": model, "seeds": len(seeds)}
    for name, path in _INSPECTED.items():
        found[name] = _mean([cells.value(f"evaluate.inspection.{path}", model, seed) for seed in seeds])
    gaps = [_gaps(cells, model, seed) for seed in seeds]
    found["group_gap"] = _mean([gap for entry in gaps for gap in entry["group"]])
    found["random_gap"] = _mean([gap for entry in gaps for gap in entry["random"]])
    return found


def _gaps(cells: Cells, model: str, seed: str) -> dict[str, list[float]]:
    """Gaps between circuit and model without a set of heads, for groups and for random sets."""
    record = (cells.record("evaluate", model, seed).get("inspection") or {}).get("completeness") or {}
    random = [entry["gap"] for name, entry in record.items() if name.startswith("random_")]
    others = [e["gap"] for name, e in record.items() if not name.startswith(("random_", "worst_", "nothing"))]
    return {"group": others, "random": random}


def random_floor(cells: Cells, measure: str) -> float | None:
    """What random circuits of the same shape have in the base, in the unit of a circuit measure or None."""
    values: list[float | None] = []
    for seed in cells.seeds:
        for kind in ("", "_ld"):
            null = _mean(_random(cells, seed, f"faithfulness{kind}"))
            circuit = cells.value(f"evaluate.circuit.faithfulness{kind}", BASE, seed)
            if measure == f"evaluate.circuit.retention{kind}" and null is not None and circuit:
                values.append(null / circuit)
            elif measure == f"evaluate.circuit.faithfulness{kind}":
                values.append(null)
    return _mean(values)


def checks(cells: Cells, primary: list[Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Could the experiment have shown anything? What should hold, what was found, and whether it holds."""
    n = len(cells.seeds)
    known = [cells.value("evaluate.circuit.faithfulness", BASE, seed) for seed in cells.seeds]
    best = [max(_random(cells, seed, "faithfulness"), default=None) for seed in cells.seeds]
    beats = [a > b for a, b in zip(known, best, strict=True) if a is not None and b is not None]
    reached = sum(cells.reached(arm, seed) for arm in cells.arms for seed in cells.seeds)
    cell_count = len(cells.arms) * n
    found = [
        {
            "what": "The base's circuit beats every random circuit of its shape, at every seed",
            "numbers": [sum(beats), n],
            "text": "{} of {} bases",
            "holds": sum(beats) == n if beats else None,
        },
        {
            "what": "Every arm reaches the matching level at every seed",
            "numbers": [reached, cell_count],
            "text": "{} of {} runs",
            "holds": reached == cell_count,
        },
    ]
    for entry in primary:
        if entry["arm"] in ("sft_replay", "noise"):
            arm, reference = names[entry["arm"]], names[entry["reference"]]
            found.append(
                {
                    "what": f"Positive control: {arm} keeps more than {reference}"
                    if entry["arm"] == "sft_replay"
                    else f"Sham control: {arm}, weights moved equally far, keeps more than {reference}",
                    "numbers": [entry["difference"]],
                    "text": "difference {}",
                    "holds": None if entry["difference"] is None else entry["difference"] > 0,
                }
            )
    return found


def _base_values(cells: Cells, measure: str) -> list[float | None]:
    return [cells.value(measure, BASE, seed) for seed in cells.seeds]


def _random(cells: Cells, seed: str, kind: str) -> list[float]:
    record = cells.record("evaluate", BASE, seed).get("random") or {}
    return [value for value in record.get(kind) or [] if value is not None]


def _mean(values: list[Any]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
