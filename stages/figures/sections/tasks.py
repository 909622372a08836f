"""The two tasks: accuracy in the new one against the old one, and the trade-off between them."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.sections.formatting import contrast_name, interval, of_arms
from stages.figures.style import label
from stages.statistics.wording import number


def section(summary: Mapping[str, Any]) -> Section:
    """What the tasks are, how the arms move between them, and the hypervolume of each arm."""
    level = "" if summary["level"] is None else f" They are compared where they reach {number(summary['level'], 2)}."
    shortcut, name = "", summary["shortcut_name"]
    if name is not None:
        shortcut = f" The best answer without the skill ({name}) scores {number(summary['shortcut'])}."
    [old_task] = summary["old_task"]
    same = " and ".join(label(arm) for arm in summary["taught_as_gold"])
    one = f" Every prompt has one right answer, so {same} learned from the same answers as {label('sft_gold')}."
    return Section(
        "New task against old",
        (
            f"The old task is {old_task['title']}; the new task is “{summary['new_task']}”.{level}{shortcut}"
            f"{one if same else ''}",
        ),
        (
            Picture(
                "pareto",
                "Runs start at the base (star) and move right as they learn; higher is less forgotten. "
                "Thin lines are seeds, thick ones their means, marks the matched models (selection split). "
                "The random direction learns nothing: it is moved as far in weights as the arm that it "
                "imitates. The last panel shows how much of the circuit the matched models keep "
                "(evaluation split).",
            ),
        ),
        (_hypervolume(summary),),
    )


def _hypervolume(summary: Mapping[str, Any]) -> Table:
    [found] = summary["table_hypervolume"]
    rows = [
        (label(arm), str(e["n"]), number(e["mean"]), interval(e["ci"], False))
        for arm, e in of_arms(summary, found["arms"])
    ]
    rows += [
        (
            contrast_name(e),
            str(e["n"]),
            number(e["mean"], signed=True),
            interval(e["ci"]),
        )
        for e in found["contrasts"]
    ]
    return Table(
        "Hypervolume: the area below an arm's best trade-off between new and old accuracy, over all checkpoints and "
        f"learning rates (selection split), counted from {found['reference']} and as a share of the area that full "
        "marks in both would have; means over seeds and t intervals. It describes, nothing is tested.",
        ("Arm or contrast", "Seeds", "Hypervolume", "t interval"),
        rows,
        1,
    )
