"""The contrasts: the planned differences between arms and their verdicts."""

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
            summary["registration_sentence"],
            f"Primary measure: {short_name(plan['primary'])}, the share {phrase(plan['primary'])} that is left. The "
            "hypotheses (H) were fixed in params.yaml before the runs; their p values are corrected together (Holm, "
            f"{len(summary['table_family'])}). Further contrasts (D) describe, and controls (C) say whether the "
            "experiment could have shown anything; these are not corrected.",
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
            Picture(
                "forest",
                "The hypotheses seed by seed. A line from zero is the difference of the two arms at one seed, sorted "
                f"by the first hypothesis; below them the mean with its {percent} t interval.",
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
        ),
    )
