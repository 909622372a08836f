"""What was left out of the contrasts, and what this experiment cannot say."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.figures.parts import Section
from stages.figures.style import label
from stages.statistics.wording import count, left_out, reasons


def section(summary: Mapping[str, Any]) -> Section:
    """Pairs, seeds and models that do not count, with the reason, and the limits of it all."""
    plan = summary["plan"][0]
    names = {model["model"]: label(model["model"]) for model in summary["table_models"]}
    lines = []
    for entry in summary["table_contrasts"]:
        if entry["measure"] == plan["primary"] and entry["excluded"]:
            lines.append(
                f"{entry['name']}: {count(len(entry['excluded']), 'pair')} left out ({reasons(entry, names)})."
            )
    if bases := left_out(summary["bases_left_out"]):
        lines.insert(
            0,
            f"{bases} A circuit that does not work in the base cannot say what fine-tuning keeps, so a seed counts "
            f"only where the base circuit reaches at least {plan['base_faithfulness']:g} of the model.",
        )
    elif not lines:
        lines.append("No pair of the primary contrasts was left out.")
    unreached = _cell_list(summary["unreached"])
    lines.append(f"Matching level not reached: {unreached}." if unreached else "Every run reached the matching level.")
    hidden = _cell_list(summary["not_identifiable"])
    lines.append(
        f"Circuit not identifiable, because the model is too close to chance in the old task: {hidden}."
        if hidden
        else "A circuit was identifiable in every model."
    )
    lines.append(
        "Limits: one architecture, one pair of tasks, attention heads only (MLPs, embeddings and "
        "norms always count as part of a circuit). Whether an arm reaches the level is itself an outcome, "
        "so comparing only those that do can bias a contrast; the reach rates above say how much room "
        "there is for that. What holds here need not hold in larger models."
    )
    return Section("What was left out, and what this cannot say", lines)


def _cell_list(entries: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(f"{label(entry['model'])} at seed {entry['seed']}" for entry in entries)
