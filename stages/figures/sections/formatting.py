"""How several sections write the same things: contrasts, intervals, means, and what there is of each arm."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.figures.style import label
from stages.statistics.wording import number


def contrast_name(entry: Mapping[str, Any]) -> str:
    """A contrast by its number and its two arms, for example “H1: GRPO − SFT”."""
    return f"{entry['name']}: {label(entry['arm'])} − {label(entry['reference'])}"


def interval(bounds: Sequence[float] | None, signed: bool = True) -> str:
    """The two bounds of an interval, or a dash where there is none."""
    return "–" if bounds is None else f"{number(bounds[0], signed=signed)} to {number(bounds[1], signed=signed)}"


def mean_interval(entry: Mapping[str, Any], signed: bool = False) -> str:
    """A mean with its interval in brackets, where there is one."""
    if entry["ci"] is None:
        return number(entry["mean"], signed=signed)
    return f"{number(entry['mean'], signed=signed)} ({interval(entry['ci'], signed)})"


def of_arms(summary: Mapping[str, Any], entries: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What there is of each arm, in the order of the params; what was read from a file has its keys sorted."""
    models = [entry["model"] for entry in summary["table_models"]]
    return [(model, entries[model]) for model in models if model in summary["arms"]]
