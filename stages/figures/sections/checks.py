"""The checks: could this experiment have shown anything, and what can its pairs resolve?"""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Section, Table
from stages.figures.sections.formatting import contrast_name
from stages.statistics.wording import number


def section(summary: Mapping[str, Any]) -> Section:
    """What should hold for the contrasts to mean something, and whether it does."""
    verdicts = {True: "pass", False: "fail", None: "no data"}
    rows = [(check["what"], verdicts[check["holds"]], check["found"]) for check in summary["table_checks"]]
    table = Table(
        "A check that fails limits what the contrasts can say.", ("What should hold", "Check", "Found"), rows, 3
    )
    plan = summary["plan"][0]
    resolved = [
        (
            contrast_name(e),
            str(e["n"]),
            *(number(e[key]) for key in ("sd", "detectable", "provable_margin")),
        )
        for e in summary["table_contrasts"]
        if e["measure"] == plan["primary"]
    ]
    resolution = Table(
        "What the pairs can resolve at the spread that was seen: the smallest true difference of the primary measure "
        f"that a paired t test at {plan['alpha']:g}, not corrected, detects with {100 * plan['power']:g} % power, and "
        "the smallest margin within which TOST shows equal arms to be equal as often.",
        ("Contrast", "Pairs", "SD of differences", "Detectable difference", "Provable margin"),
        resolved,
        1,
    )
    return Section("Could this experiment have shown anything?", tables=(table, resolution))
