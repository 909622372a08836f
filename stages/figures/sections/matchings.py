"""The matchings: the contrasts again at other levels, at equal distance and at equal budget."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.sections.formatting import contrast_name, mean_interval, of_arms
from stages.figures.style import label
from stages.measures.scores import ENDINGS, score_of
from stages.statistics.wording import number

_MATCHED_BY = {
    "new_accuracy": "new-task accuracy",
    "kl_new": "KL",
    "weight_norm": "weight norm",
    "gradient_steps": "gradient steps",
}


def section(summary: Mapping[str, Any]) -> Section:
    """What is kept where arms are matched by something else than the level of the contrasts."""
    entries = summary["table_matchings"]
    kept = f"retention{ENDINGS[score_of(summary['plan'][0]['primary'])]}"  # of the primary measure's score
    other = "retention" if kept == "retention_ld" else "retention_ld"
    few = [f"{_matching_name(e)} ({e['reached']} of {e['of']} runs)" for e in entries if e["selected"]]
    reach = (
        f"Marked with *, because fewer than {summary['least_reached_percent']:g} % of the runs that learn get there, "
        f"so that those that do are a selection: {', '.join(few)}."
        if few
        else "Every one of these is reached by nearly all runs that learn."
    )
    distances = [
        (
            _matching_name(entry),
            label(arm),
            f"{found['reached']} of {found['of']}",
            *(number(found["picked"][column]) for column in ("kl_new", "weight_norm", "new_accuracy")),
            *(mean_interval(found[measure]) for measure in (kept, other, "old_accuracy")),
        )
        for entry in entries
        if entry["by"] != "new_accuracy"
        for arm, found in of_arms(summary, entry["arms"])
    ]
    names = [contrast_name(e) for e in entries[0]["contrasts"]]
    differences = [
        (_matching_name(entry), title, *(mean_interval(e[measure], True) for e in entry["contrasts"]))
        for measure, title in ((kept, "Retention"), ("old_accuracy", "Old-task accuracy"))
        for entry in entries
    ]
    return Section(
        "At other levels, at equal distance, and at equal budget",
        (
            "The contrasts above are at one level of the new task. Here the same checks are made at other levels, and "
            "at checkpoints that moved equally far from the base, in answers (KL) or in weights (norm), and after "
            "equally many gradient steps, always at the same learning rate. These describe; nothing is tested. "
            f"{reach}",
        ),
        (
            Picture(
                "matchings",
                "Above: what the base's circuit in place still does. Below: the old task of the whole model. Large "
                "marks are means, small ones seeds; the level of the contrasts is in bold. Every run is at its first "
                "checkpoint at the value. The random direction is moved as far in weights as the arm that it "
                "imitates; it learns nothing.",
            ),
        ),
        (
            Table(
                "At equal distance and at equal budget. Reached: seeds with a checkpoint at the value; its own KL, "
                "norm and new-task accuracy (means, selection split) say how close it came. What is kept: means on the "
                "evaluation split, over the seeds whose base counts, with t intervals.",
                (
                    "Matched on",
                    "Arm",
                    "Reached",
                    "KL",
                    "Norm",
                    "New-task accuracy",
                    "Circuit retention",
                    "in accuracy" if other == "retention" else "in logit difference",
                    "Old-task accuracy",
                ),
                distances,
                2,
            ),
            Table(
                "The planned differences at every matching, paired over seeds, with t intervals.",
                ("Matched on", "Measure", *names),
                differences,
                2,
            ),
        ),
    )


def _matching_name(entry: Mapping[str, Any]) -> str:
    return f"{_MATCHED_BY[entry['by']]} {entry['at']:g}{'*' if entry['selected'] else ''}"
