"""How bases and arms learned: curves, budgets, and how much the learning rate matters."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.style import label, look
from stages.statistics.wording import number


def _steps(summary: Mapping[str, Any]) -> Table:
    return Table(
        "What single gradient steps were like, means over steps and seeds: up to the checkpoint that is compared / "
        "behind it. Gradient: its norm before it is clipped, and the share of steps that were clipped. Update: norm of "
        "what a step changed in the weights; with AdamW it hangs on the learning rate more than on the gradient. "
        "Entropy: of the answers, in nats. Ratio clipped: share of answers whose probability had moved too far since "
        "they were drawn.",
        ("Arm", "Gradient", "Clipped", "Update", "Entropy", "Reward", "Ratio clipped"),
        [
            (
                label(e["arm"]),
                *(
                    f"{number(e['to_pick'][name], digits)} / {number(e['behind'][name], digits)}"
                    for name, digits in (
                        ("gradient_norm", 2),
                        ("clipped", 2),
                        ("update_norm", 3),
                        ("entropy", 2),
                        ("reward", 2),
                        ("clip_fraction", 2),
                    )
                ),
            )
            for e in summary["table_steps"]
        ],
    )


def section(summary: Mapping[str, Any]) -> Section:
    """What the arms learn from, their curves, their budgets and what their learning rates lead to."""
    arms = Table(
        "What each arm learns from.",
        ("Arm", "Learns from"),
        [(label(arm), look(arm).about) for arm in summary["arms"]],
        2,
    )
    rows = [
        (
            label(e["arm"]),
            f"{e['learning_rate']:g}",
            f"{e['reached']} of {e['of']}",
            number(e["mean"]),
        )
        for e in summary["table_learning_rates"]
    ]
    budgets = [
        (
            label(e["arm"]),
            *(str(e[name]) for name in ("steps", "answers", "tokens")),
            *(number(e[f"{name}_to_level"], 0) for name in ("steps", "answers", "tokens")),
        )
        for e in summary["table_budgets"]
    ]
    tables = (
        (
            Table(
                "Budgets: equal in gradient steps and in the prompts of a step; of a whole run, and up to the "
                "checkpoints that are compared (means over seeds). Answers are what is learned from, the rollouts of "
                "RL arms. Tokens count every answer with a prompt of its own, though all answers of a prompt are "
                "computed in one pass here.",
                ("Arm", "Steps", "Answers", "Tokens", "Steps to the level", "Answers", "Tokens"),
                budgets,
                1,
            ),
            Table(
                "Old-task accuracy (selection split) where the matching level is reached, for every "
                "learning rate of the grid: how much the learning rate matters beside the method.",
                ("Arm", "Learning rate", "Runs that reach the level", "Old-task accuracy"),
                rows,
                1,
            ),
        )
        if rows
        else ()
    )
    return Section(
        "How they learned",
        (),
        (
            Picture(
                "training",
                "Left: the bases. Right: the arms on the new task (above) and the old one (below); thin "
                "lines are seeds, thick ones their means.",
            ),
        ),
        (arms, *tables, *((_steps(summary),) if summary["table_steps"] else ())),
    )
