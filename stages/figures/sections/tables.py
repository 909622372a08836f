"""The tables of everything measured: means of models, every seed, contrasts of secondary measures."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Section, Table
from stages.figures.sections.formatting import contrast_name, interval
from stages.figures.style import label
from stages.statistics.wording import number, short_name


def section(summary: Mapping[str, Any]) -> Section:
    """All measures of all models, for those who look for one number."""
    measures, plan = summary["measures"], summary["plan"][0]
    names = [short_name(measure) for measure in measures]
    models = [
        (
            label(entry["model"]),
            _reach(summary, entry["model"]),
            *(_mean_sd(entry["measures"][measure]) for measure in measures),
        )
        for entry in summary["table_models"]
    ]
    seeds = [
        (
            label(entry["model"]),
            entry["seed"],
            {True: "yes", False: "no", None: "–"}[entry["reached"]],
            "–" if entry["step"] is None else str(entry["step"]),
            *(number(entry["measures"][measure]) for measure in measures),
        )
        for entry in summary["table_seeds"]
    ]
    secondary = [
        (
            short_name(e["measure"]),
            contrast_name(e),
            str(e["n"]),
            number(e["difference"], signed=True),
            interval(e["ci"]),
            number(e["p"], 4),
        )
        for e in summary["table_contrasts"]
        if e["measure"] != plan["primary"]
    ]
    return Section(
        "Tables",
        (),
        (),
        (
            Table(
                "Means over the seeds that count in the contrasts, ± standard deviation between seeds.",
                ("Model", "Reached", *names),
                models,
                1,
            ),
            Table("Every seed.", ("Model", "Seed", "Reached", "Step", *names), seeds, 1),
            Table(
                "Contrasts of secondary measures; these describe, their p values are not corrected.",
                ("Measure", "Contrast", "Pairs", "Difference", "t interval", "Exact p"),
                secondary,
                2,
            ),
        ),
    )


def _reach(summary: Mapping[str, Any], model: str) -> str:
    arm = summary["arms"].get(model)
    return "–" if arm is None else f"{arm['reached']} of {arm['of']}"


def _mean_sd(entry: Mapping[str, Any]) -> str:
    return number(entry["mean"]) if entry["sd"] is None else f"{number(entry['mean'])} ± {number(entry['sd'])}"
