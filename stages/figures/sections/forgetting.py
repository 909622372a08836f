"""Forgetting against distance: does the method matter among models that moved equally far from the base?"""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.sections.formatting import interval
from stages.figures.style import label
from stages.statistics.wording import number, short_name


def section(summary: Mapping[str, Any]) -> Section:
    """The method's effect at equal distance, and what predicts how much is lost."""
    adjustment = summary["adjustment"][0]
    families = "; ".join(
        f"{name}: {', '.join(label(arm) for arm in arms) or 'none'}" for name, arms in adjustment["families"].items()
    )
    distance = short_name(adjustment["distance"])
    effects = [
        (
            " − ".join(label(name) for name in e["name"].split(" − ")),
            e["adjusted_why_not"] or "",
            str(e["n"]),
            number(e["raw_effect"], signed=True),
            number(e["adjusted_effect"], signed=True),
            interval(e["adjusted_ci"]),
            *(_r2(e[key]) for key in ("raw_r2", "distance_r2", "adjusted_r2")),
        )
        for e in (adjustment["effects"][0], *adjustment["by_reference"], *adjustment["effects"][1:])
    ]
    predictors = [
        (
            short_name(e["measure"]),
            e["why_not"] or "",
            str(e["n"]),
            number(e["effect"], signed=True),
            interval(e["ci"]),
            _r2(e["r2"]),
        )
        for e in adjustment["predictors"]
    ]
    percent = f"{100 * summary['plan'][0]['confidence']:g} %"
    return Section(
        "Forgetting against distance",
        adjustment["sentences"],
        (
            Picture(
                "forgetting",
                "Arms at the same distance from the base are compared by looking straight up: left, "
                "distance in outputs on new-task prompts; right, distance in weights, with a random "
                "direction as the control. Thin lines are seeds, thick ones their means, marks the matched "
                "models. One learning rate, the one that arms are matched at.",
            ),
        ),
        (
            Table(
                f"Does the method matter at the same distance? {short_name(adjustment['outcome'])} of the matched "
                f"models by method and {distance}, in a linear model with the seed as block ({families}; a family is "
                "the mean of its arms). The distance is itself an outcome of the method, so this says what goes "
                "together. R2 is of seeds that were not fitted: 0 is guessing that all arms of a "
                "seed are alike, and it is negative where the model does worse.",
                (
                    "Methods",
                    "Not estimable because",
                    "Seeds",
                    "Difference",
                    "Adjusted",
                    f"{percent} interval",
                    "R2, method",
                    "distance",
                    "both",
                ),
                effects,
                2,
            ),
            Table(
                f"What predicts the loss of {short_name(adjustment['forgetting'])}? One line for each predictor, over "
                "all arms, with the seed as block; the interval takes the models of a seed for independent. R2 as "
                "above.",
                ("Predictor", "Not estimable because", "Models", "Slope", f"{percent} interval", "R2"),
                predictors,
                2,
            ),
        ),
    )


def _r2(value: float | None) -> str:
    return "below −1" if value is not None and value < -1 else number(value, 2)
