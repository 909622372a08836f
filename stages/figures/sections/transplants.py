"""Transplants: what tuned heads do in the base, and the base's heads in the tuned model."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.sections.formatting import mean_interval
from stages.figures.style import label
from stages.statistics.wording import number


def _heads(summary: Mapping[str, Any]) -> Table:
    """Single heads, by group; groups that few bases have are left to summary.json."""
    most = max(entry["bases"] for entry in summary["table_heads"])
    return Table(
        "Single heads of the base's circuit, transplanted one at a time, by the group that they belong to; groups that "
        "at least half as many bases have as the commonest. Damage: what the base loses by the tuned model's output "
        "there; repair: what the tuned model gains by the base's; in shares of the base's logit difference, means over "
        "heads. A head that others stand in for does little alone.",
        ("Arm", "Group", "Bases", "Heads", "Damage", "Largest", "Repair"),
        [
            (
                label(e["arm"]),
                e["group"],
                str(e["bases"]),
                str(e["heads"]),
                number(e["damage"], signed=True),
                number(e["most"], signed=True),
                number(e["repair"], signed=True),
            )
            for e in summary["table_heads"]
            if 2 * e["bases"] >= most
        ],
        2,
    )


def section(summary: Mapping[str, Any]) -> Section:
    """Cross-model patching by group of heads, and which of the heads' inputs carries the change."""
    entries = summary["table_inputs"]
    columns = [name for name in ("q", "k", "v", "outputs") if entries and name in entries[0]]
    inputs = Table(
        "Which input of the heads of the base's circuit carries what changed? Accuracy of the base with the tuned "
        "model's q (at the heads' own positions), k or v (at every token, since heads read them anywhere), or outputs, "
        "of the whole circuit: the lower, the more of the damage it carries. Means over the seeds that count in the "
        "contrasts, with t intervals; without random heads.",
        ("Arm", "Seeds", "Base", *(f"with {name}" for name in columns), "Tuned model"),
        [
            (
                label(e["arm"]),
                str(e["seeds"]),
                number(e["base"]["mean"]),
                *(mean_interval(e[name]) for name in columns),
                number(e["tuned"]["mean"]),
            )
            for e in entries
        ],
    )
    without = "The heads' q, k and v were not transplanted (cmap.inputs), so no table says which of them carries it."
    return Section(
        "Transplants",
        () if entries else (without,),
        (
            Picture(
                "transplants",
                "Cross-model activation patching, by group of heads and for the whole circuit. Above: a "
                "bar below the black tick (the base alone) means that tuned heads no longer do the base's "
                "work. Below: a bar above the black tick (the tuned model alone) means that the base's "
                "heads bring back what tuning damaged; the dashed line is the base, the ceiling. Diamonds: "
                "as many random heads instead.",
            ),
        ),
        (*((inputs,) if entries else ()), *((_heads(summary),) if summary["table_heads"] else ())),
    )
