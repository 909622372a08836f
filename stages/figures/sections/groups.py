"""What the groups of heads carry, by component masking."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.style import label
from stages.statistics.wording import number


def section(summary: Mapping[str, Any]) -> Section:
    """What swapping the heads of a group moves, and whether the same heads carry it after tuning."""
    asked, [old_task] = summary["table_desiderata_of_base"], summary["old_task"]
    groups = sorted({group for entry in asked for group in entry["accuracy"]})
    rows = [
        (
            entry["desideratum"],
            *(number(entry["accuracy"].get(group)) for group in groups),
            number(entry["floor"]),
            number(entry["random"]),
        )
        for entry in asked
    ]
    masks = [
        (label(e["arm"]), str(e["masks"]), *(number(e[key]) for key in ("share", "chance", "ceiling")))
        for e in summary["table_masks"]
    ]
    same_heads = Table(
        "Do the same heads carry it? Masks that select some but not all heads of a group and move at least half of "
        "the base's answers: share of their heads that are also among as many strongest heads of the tuned model's "
        "mask, at seeds that reach the level. Chance: as many random heads of the group. Ceiling: two masks of the "
        "base itself, trained on different pairs; a tuned model's mask, trained on the same pairs as the base's, can "
        "pass it.",
        ("Arm", "Masks", "Share", "Chance", "Ceiling"),
        masks,
        1,
    )
    tables = (
        (
            Table(
                "All desiderata that the bases were asked, means over those bases that have the group: share of test "
                f"pairs in which swapping the selected heads moves the answer to the target. "
                f"{old_task['desiderata_note']} Floor: nothing swapped. Random: as many random heads at the position "
                "where they move most.",
                ("Desideratum", *groups, "Floor", "Random"),
                rows,
                1,
            ),
        )
        if rows
        else ()
    )
    return Section(
        "What the groups carry",
        (),
        (
            Picture(
                "desiderata",
                "Desiderata-based component masking: share of test pairs in which swapping a group's "
                f"selected heads moves the answer as it must if the group carries {old_task['carried']}. Ticks: floor "
                "with nothing swapped. Diamonds: as many random heads.",
            ),
        ),
        (same_heads, *tables),
    )
