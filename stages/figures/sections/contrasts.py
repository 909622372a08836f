"""The contrasts: the planned differences between arms, their verdicts, and the two hypotheses on distance."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.sections.formatting import contrast_name, interval
from stages.statistics.wording import number, phrase, short_name


def section(summary: Mapping[str, Any]) -> Section:
    """What answers the question: every contrast of the primary measure, drawn and in a table."""
    plan = summary["plan"][0]
    entries = [entry for entry in summary["table_contrasts"] if entry["measure"] == plan["primary"]]
    verdicts = summary["contrasts"]
    by_example = any(e["ci_hierarchical"] for e in entries)  # records of older runs have no outcomes by example
    rows = [
        (
            contrast_name(e),
            verdicts[e["name"]]["verdict"],
            str(e["n"]),
            number(e["difference"], signed=True),
            interval(e["ci"]),
            interval(e["ci_bootstrap"]),
            *([interval(e["ci_hierarchical"])] if by_example else []),
            number(e["p"], 4),
            number(e["p_holm"], 4),
            number(e["p_equivalent"], 4),
        )
        for e in entries
    ]
    percent = f"{100 * plan['confidence']:g} %"
    return Section(
        "The contrasts",
        (
            f"Primary measure: {short_name(plan['primary'])}, the share {phrase(plan['primary'])} that is left. The "
            "hypotheses (H) were fixed in params.yaml before the runs; their p values are corrected together (Holm, "
            f"{len(summary['table_family'])} hypotheses, the last two of which are not about two arms). Controls (C) "
            "say whether the experiment could have shown anything; they are not corrected.",
        ),
        (
            Picture(
                "contrasts",
                "Left: what each arm keeps; bars are means over seeds, the dotted line is what random "
                f"circuits of the same shape have. Right: paired differences with {percent} t intervals; "
                f"the grey band (±{number(plan['equivalence_margin'])}) counts as no difference; p is the "
                "exact sign-flip test, not yet corrected. An arrow head at the edge is an interval that "
                "goes on beyond it.",
            ),
        ),
        (
            Table(
                f"Contrasts of the primary measure. Clear: corrected p below {plan['alpha']:g} and an "
                "interval without zero. Suggestive: only the interval. Equivalent: inside the margin "
                "(TOST). Undecided: none of these."
                + (
                    " The hierarchical bootstrap draws seeds, and examples inside them; like the plain one it is too "
                    "narrow where seeds are few."
                    if by_example
                    else ""
                ),
                (
                    "Contrast",
                    "Verdict",
                    "Pairs",
                    "Difference",
                    f"{percent} t interval",
                    "Bootstrap interval",
                    *(["Hierarchical bootstrap"] if by_example else []),
                    "Exact p",
                    "Holm p",
                    "TOST p",
                ),
                rows,
                2,
            ),
            _further_hypotheses(summary),
        ),
    )


def _further_hypotheses(summary: Mapping[str, Any]) -> Table:
    adjustment, percent = summary["adjustment"][0], f"{100 * summary['plan'][0]['confidence']:g} %"
    effect, prediction = adjustment["effects"][0], adjustment["prediction"]
    by_distance, by_prediction = summary["table_family"][-2:]
    first, second = (short_name(measure) for measure in [*prediction["measures"], "–", "–"][:2])
    closeness = " and ".join(number(mean, 2) for mean in prediction["correlations"] or ())
    return Table(
        f"The two hypotheses that are not about two arms. {by_distance['name']}: t test of the method's effect in a "
        f"linear model with the distance and the seed (an effect above zero: {effect['name'].split(' − ')[0]} keeps "
        f"more). {by_prediction['name']}: exact sign-flip test of how much more closely the loss goes with the one "
        f"distance than with the other (correlations over the models of a seed, on average {closeness}). More of both "
        f"under “Forgetting against distance”. {adjustment['one_arm_at_a_time']}".rstrip(),
        ("Hypothesis", "Seeds", "Estimate", f"{percent} interval", "p", "Holm p"),
        (
            (
                f"{by_distance['name']}: {effect['name']}, {short_name(adjustment['outcome'])}, at equal "
                f"{short_name(adjustment['distance'])}",
                str(effect["n"]),
                number(effect["adjusted_effect"], signed=True),
                interval(effect["adjusted_ci"]),
                number(by_distance["p"], 4),
                number(by_distance["p_holm"], 4),
            ),
            (
                f"{by_prediction['name']}: loss of {short_name(adjustment['forgetting'])}, how much more closely it "
                f"goes with {first} than with {second}",
                str(prediction["n"]),
                number(prediction["difference"], signed=True),
                interval(prediction["ci"]),
                number(by_prediction["p"], 4),
                number(by_prediction["p_holm"], 4),
            ),
        ),
        1,
    )
