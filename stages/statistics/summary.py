"""Every number of the report in one place: reports/summary.json.

The report is written from this alone. DVC shows nested dictionaries as metrics and passes over lists, so the
few numbers that experiments are compared by stand in dictionaries with stable keys, and tables stand in
lists.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stages.measures.scores import ENDINGS, score_of
from stages.statistics import by_ablation, by_score, enhancement, idle, precision, registration
from stages.statistics.cells import BASE, Cells, mean_of_defined
from stages.statistics.contrasts import PAIRS, Plan, describe, left_out_bases
from stages.statistics.heads import table_of_heads
from stages.statistics.inputs import table_of_inputs
from stages.statistics.masks import table_of_masks
from stages.statistics.matchings import LEAST_REACHED
from stages.statistics.primary import above_chance, base_measure, random_floor, random_shares
from stages.statistics.similarity import table
from stages.statistics.wording import (
    SCORES,
    adjustment_sentences,
    headline,
    number,
    one_arm_at_a_time,
    sample_of,
    verdict,
)

_ALWAYS = ("evaluate.old_accuracy", "evaluate.new_accuracy")
_LAST = ("drift.weight_norm",)

LEAST_OLD_ACCURACY = 0.95  # a base below it does not know the task whose circuit is sought
HALF_TRAINED = (0.5, 0.8)  # around the .66 of the published base
LEAST_PASS_AT_8 = 0.8  # a base below it seldom samples a right answer of the new task, which RL learns from
MOST_RANDOM_FAITHFULNESS = 0.3  # above it, heads at the circuit's positions do well whichever they are


def plan_of(statistics: Mapping[str, Any]) -> Plan:
    """The plan that statistics.json was made by."""
    plan = dict(statistics["plan"])
    for key in PAIRS:  # plans of earlier runs have no pairs that describe
        plan[key] = tuple((arm, reference) for arm, reference in plan.get(key, ()))
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
    left_out = left_out_bases(cells, plan)
    described = {model: {m: describe(cells, plan, m, model, left_out) for m in measures} for model in cells.models}
    primary = [entry for entry in statistics["contrasts"] if entry["measure"] == plan.primary]
    levels = {cells.record("match", arm, seed)["level"] for arm in cells.arms for seed in cells.seeds}
    level = levels.pop() if len(levels) == 1 else None
    shortcut = max(shortcuts.items(), key=lambda item: item[1]) if shortcuts else (None, None)
    first = primary[0] if plan.contrasts else None
    old_task, new_task = statistics["old_task"], statistics["new_task"]
    same_task = new_task == old_task["same_as"]
    found = checks(cells, plan, new_task, same_task, primary, names)
    models = enhancement.table_of_models(cells, old_task["name"]) if same_task else []
    heads = enhancement.table_of_transplants(cells) if same_task else []
    findings = enhancement.findings(models, heads, names) if same_task else []
    scores, ablations = by_score.table_scores(cells, plan, left_out), by_ablation.table_ablations(cells, plan, left_out)
    rounded = precision.table_of_precision(cells)
    judged_by, answer = _judged_by(cells), "No contrast was planned."
    if first:
        imported = any(cells.imported(first[side]) for side in ("arm", "reference"))
        answer = headline(first, names, statistics["plan"], level, same_task, imported)
    return {
        "headline": {
            "sentence": " ".join([*findings, answer, *_failed_controls(found)]),
            "verdict": verdict(first, plan.alpha) if first else "no contrast",
        },
        "old_task": [old_task],
        "new_task": new_task,
        "level": level,
        "shortcut": shortcut[1],
        "shortcut_name": shortcut[0],
        "n_pairs": statistics["n_pairs"],
        "power_note": statistics["power_note"],
        "base": _base(cells) | {"left_out": len(statistics["bases_left_out"])},
        "bases_left_out": list(statistics["bases_left_out"]),
        "sample": _sample(cells),
        "random_floor": random_floor(cells, plan.primary, [seed for seed in cells.seeds if seed not in left_out]),
        "arms": {
            arm: dict(statistics["reach"][arm])
            | {key(m): described[arm][m]["mean"] for m in measures}
            | {f"{key(m)}_sd": described[arm][m]["sd"] for m in measures}
            | {"hypervolume": statistics["hypervolume"]["arms"][arm]["mean"]}
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
        "adjustment": [
            statistics["adjustment"]
            | {
                "sentences": adjustment_sentences(statistics["adjustment"], names, plan.confidence),
                "one_arm_at_a_time": one_arm_at_a_time(statistics["adjustment"], names),
            }
        ],
        "measures": list(measures),
        "table_contrasts": list(statistics["contrasts"]),
        "table_family": list(statistics["family"]),
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
        "table_precision": rounded,
        "precision_findings": precision.findings(rounded),
        "circuits_judged_by": judged_by,
        "table_circuits": [_circuit_tests(cells, model, judged_by) for model in cells.models],
        "table_similarity": table(statistics, cells.arms),
        "similarity_pairs_of_bases": statistics["similarity"]["floor"]["pairs"],
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
        "table_matchings": list(statistics["matchings"]),
        "table_hypervolume": [statistics["hypervolume"]],
        "registration": [statistics["registration"]],
        "registration_sentence": registration.sentence(statistics["registration"]),
        "table_specification": [
            {key: entry[key] for key in ("name", "arm", "reference", "of", "agree", "clear", "against")}
            | {"share": entry["agree"] / entry["of"] if entry["agree"] is not None else None}
            for entry in statistics["specification"]
        ],
        "table_steps": list(statistics["steps"]),
        "table_heads": table_of_heads(cells, plan, left_out),
        "idle_findings": idle.findings(cells),
        "table_inputs": table_of_inputs(cells, plan, left_out),
        "table_masks": table_of_masks(cells),
        "primary_score": score_of(plan.primary),
        "table_scores": scores,
        "score_findings": by_score.findings(scores, plan.primary, old_task),
        "table_ablations": ablations,
        "ablation_findings": by_ablation.findings(ablations, plan.primary, names),
        "table_desiderata_of_base": _desiderata_of_base(cells),
        "table_enhancement": models,
        "table_enhancing_heads": heads,
        "enhancement_findings": findings,
        "least_reached_percent": 100 * LEAST_REACHED,
        "not_identifiable": [
            {"model": model, "seed": seed}
            for model in cells.models
            for seed in cells.seeds
            if not cells.record("circuit", model, seed)["identifiable"]
        ],
        "unreached": [
            {"model": arm, "seed": seed} for arm in cells.arms for seed in cells.seeds if not cells.reached(arm, seed)
        ],
        "checks": {check["name"]: check["holds"] for check in found},
        "table_checks": found,
    }


def _desiderata_of_base(cells: Cells) -> list[dict[str, Any]]:
    """Every desideratum that was asked of the bases, also those of the bases alone; none if there are no such.

    Returns:
        for each: its name, the means over the bases of the accuracy of every group, of the floor and of random heads
        (the group where they do most), and the bases of each group.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}  # desideratum -> group -> scores of each base
    further = False
    for seed in cells.seeds:
        record = cells.records.get(("dcm", BASE, seed), {})
        further |= any(record.get("additional", {}).values())
        for groups in (record.get("groups") or {}, record.get("additional") or {}):
            for group, scores in groups.items():
                for name, score in scores.items():
                    found.setdefault(name, {}).setdefault(group, []).append(score)
    if not further:
        return []
    return [
        {
            "desideratum": name,
            "accuracy": {
                group: mean_of_defined([score["accuracy"] for score in scores]) for group, scores in groups.items()
            },
            "bases": {group: len(scores) for group, scores in groups.items()},
            "floor": mean_of_defined([score["floor"] for scores in groups.values() for score in scores]),
            "random": max(mean_of_defined([s["random_accuracy"] for s in scores]) or 0.0 for scores in groups.values()),
        }
        for name, groups in found.items()
    ]


def key(measure: str) -> str:
    """A measure as a key of summary.json."""
    return measure.replace(".", "_")


def _sample(cells: Cells) -> str:
    record = cells.record("pretrain", BASE, cells.seeds[0])
    return sample_of(record.get("source", "curriculum"), record.get("taught") is not None)


def _base(cells: Cells) -> dict[str, float | None]:
    measures = {
        "old_accuracy": "evaluate.old_accuracy",
        "new_accuracy": "evaluate.new_accuracy",
        "circuit_size": "evaluate.circuit.size",
        "circuit_faithfulness": "evaluate.circuit.faithfulness",
        "queried_clause_faithfulness": "evaluate.circuit_in_queried_clause.faithfulness",
    }
    found: dict[str, float | None] = {
        name: mean_of_defined(_base_values(cells, m).values()) for name, m in measures.items()
    }
    null = [value for seed in cells.seeds for value in random_shares(cells, BASE, seed, "accuracy")]
    found["random_faithfulness"] = mean_of_defined(null)
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
}
# the same by the score that stage `evaluate` judged by
_JUDGED = {
    "core_share": "minimality.core_share",
    "worst_gap": "completeness.worst_found.gap",
    "cpr": "size_curve.cpr",
    "cmd": "size_curve.cmd",
    "enough": "size_curve.enough",
}


def _judged_by(cells: Cells) -> str:
    """The score that heads were eliminated by; records of earlier runs, which do not say it, have accuracy."""
    minimality = [
        (cells.record("evaluate", BASE, seed).get("inspection") or {}).get("minimality") or {} for seed in cells.seeds
    ]
    return next((record["score"] for record in minimality if "score" in record), "accuracy")


def _circuit_tests(cells: Cells, model: str, score: str) -> dict[str, Any]:
    """Is the base's circuit minimal, complete and of the right size in this model? Means over the seeds that count."""
    seeds = [seed for seed in cells.seeds if model == BASE or cells.reached(model, seed)]
    found: dict[str, Any] = {"model": model, "seeds": len(seeds)}
    ending = ENDINGS[score]
    for name, path in (_INSPECTED | {name: f"{path}{ending}" for name, path in _JUDGED.items()}).items():
        found[name] = mean_of_defined([cells.value(f"evaluate.inspection.{path}", model, seed) for seed in seeds])
    gaps = [_gaps(cells, model, seed, f"gap{ending}") for seed in seeds]
    found["group_gap"] = mean_of_defined([gap for entry in gaps for gap in entry["group"]])
    found["random_gap"] = mean_of_defined([gap for entry in gaps for gap in entry["random"]])
    return found


def _gaps(cells: Cells, model: str, seed: str, gap: str) -> dict[str, list[float]]:
    """Gaps between circuit and model without a set of heads, for groups and for random sets."""
    record = (cells.record("evaluate", model, seed).get("inspection") or {}).get("completeness") or {}
    random = [entry[gap] for name, entry in record.items() if name.startswith("random_")]
    others = [e[gap] for name, e in record.items() if not name.startswith(("random_", "worst_", "nothing"))]
    return {"group": others, "random": random}


def checks(
    cells: Cells, plan: Plan, new_task: str, same_task: bool, primary: list[Any], names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Could the experiment have shown anything? For each check its name, what should hold, what was found, and whether
    it holds (None without data)."""
    score, counted = score_of(plan.primary), base_measure(plan.primary)
    random = {seed: max(above_chance(cells, seed, score), default=None) for seed in cells.seeds}
    least, most = HALF_TRAINED if same_task else (LEAST_OLD_ACCURACY, 1.0)
    found = [
        _of_bases(
            "base_old_accuracy",
            f"Every base is half-trained (accuracy {least:g} to {most:g})"
            if same_task
            else f"Every base knows the old task (accuracy at least {least:g})",
            _base_values(cells, "evaluate.old_accuracy"),
            lambda value: least <= value <= most,
        ),
        _of_bases(
            "base_new_pass_at_8",
            f"Every base has a right answer of the new task among eight that it samples (pass@8 at least "
            f"{LEAST_PASS_AT_8:g})",
            _base_values(cells, f"pretrain.tasks.{new_task}.pass_at_8"),
            lambda value: value >= LEAST_PASS_AT_8,
        ),
        _of_bases(
            "base_circuit_faithfulness",
            f"Every base's circuit in place keeps at least {plan.base_faithfulness:g} of the base's {SCORES[score]}",
            _base_values(cells, counted),
            lambda value: value >= plan.base_faithfulness,
        ),
        _of_bases(
            "random_circuits",
            f"No random circuit of the same shape keeps more than {MOST_RANDOM_FAITHFULNESS:g}"
            f"{' of what is above chance' if score == 'candidate_accuracy' else ''} (highest of each base)",
            {seed: value for seed, value in random.items() if value is not None},
            lambda value: value <= MOST_RANDOM_FAITHFULNESS,
        ),
    ]
    for arm in cells.arms:
        missed = [seed for seed in cells.seeds if not cells.reached(arm, seed)]
        n = len(cells.seeds)
        text = f"{n - len(missed)} of {n} seeds" + "".join(f"; not seed {seed}" for seed in missed)
        like = cells.record("match", arm, cells.seeds[0])["like"]
        if cells.imported(arm):
            continue  # imported: no level is asked of it
        what = (
            f"{names[arm]} reaches the matching level at every seed"
            if like is None
            else f"{names[arm]} is moved as far in weights as {names[like]} at every seed"
        )
        found.append(_entry(f"reached_{arm}", what, text, not missed))
        match = cells.record("match", arm, cells.seeds[0])
        if like is not None and match["step"] is not None:
            level = match["level"]
            found.append(
                _of_bases(
                    f"not_learned_{arm}",
                    f"Negative control: {names[arm]}, which learns from rewards that say nothing of the answers, stays "
                    f"below the level of {level:g} where it has moved as far as {names[like]}",
                    {
                        seed: value
                        for seed in cells.seeds
                        if cells.reached(arm, seed)
                        and (value := cells.value("evaluate.new_accuracy", arm, seed)) is not None
                    },
                    lambda value, level=level: value < level,
                )
            )
    found += _groups_carry(cells)
    sham = "gains less" if same_task else "keeps more"
    for entry in primary:
        like = cells.record("match", entry["arm"], cells.seeds[0])["like"]
        if entry["arm"] in ("sft_replay", "joint") or like is not None:
            arm, reference = names[entry["arm"]], names[entry["reference"]]
            what = (
                f"Positive control: {arm} keeps more than {reference}"
                if like is None
                else f"Sham control: {arm}, weights moved equally far, {sham} than {reference}"
            )
            difference = entry["difference"]
            text = f"difference {number(difference, signed=True)}"
            wanted = -1 if same_task and like is not None else 1
            holds = None if difference is None else wanted * difference > 0
            found.append(_entry(f"{entry['arm']}_over_{entry['reference']}", what, text, holds))
    return found


def _failed_controls(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the answer must not be told without: arms that nothing harms are equal, and that says nothing of them."""
    failed = [check for check in found if "_over_" in check["name"] and check["holds"] is False]
    if not failed:
        return []
    listed = "; ".join(f"{check['what'][0].lower()}{check['what'][1:]}, {check['found']}" for check in failed)
    return [f"But this comparison could hardly have shown a difference, since a control fails ({listed})."]


def _of_bases(
    name: str, what: str, values: Mapping[str, float | None], holds: Callable[[float], bool]
) -> dict[str, Any]:
    """A check of one number of every base; the bases that fail are named."""
    failed = {seed: value for seed, value in values.items() if value is None or not holds(value)}
    text = f"{len(values) - len(failed)} of {len(values)} bases"
    text += "".join(f"; seed {seed}: {number(value)}" for seed, value in failed.items())
    return _entry(name, what, text, not failed if values else None)


def _groups_carry(cells: Cells) -> list[dict[str, Any]]:
    """The check of stage `dcm`; none where it left no record of a group."""
    failed, n = [], 0
    for seed in cells.seeds:
        groups = cells.records.get(("dcm", BASE, seed), {}).get("groups") or {}
        n += len(groups)
        failed += [
            f"; seed {seed}: {group}"
            for group, scores in groups.items()
            if not any(s["accuracy"] > max(s["floor"], s.get("random_accuracy") or 0.0) for s in scores.values())
        ]
    what = "Every group of a base's circuit moves more answers than the floor and random heads, for some desideratum"
    text = f"{n - len(failed)} of {n} groups" + "".join(failed)
    return [_entry("groups_carry", what, text, not failed)] if n else []


def _entry(name: str, what: str, text: str, holds: bool | None) -> dict[str, Any]:
    return {"name": name, "what": what, "found": text, "holds": holds}


def _base_values(cells: Cells, measure: str) -> dict[str, float | None]:
    """Seed -> a measure of its base."""
    return {seed: cells.value(measure, BASE, seed) for seed in cells.seeds}
