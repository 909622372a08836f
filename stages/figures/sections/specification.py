"""The specification curve: whether the answer hangs on a choice of rate, matching, measure or ablation."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section
from stages.figures.style import label
from stages.statistics.wording import number


def section(summary: Mapping[str, Any]) -> Section:
    """The hypotheses under every other choice."""
    return Section(
        "Does the answer hang on a choice?",
        (
            "Each hypothesis under every other choice that could have been made: learning rate, what arms are made "
            "equal in, what is measured, and what stands around the circuit in place of the other heads. These "
            "describe: choices are not independent, and the planned one is what is tested.",
            *(_sentence(entry) for entry in summary["table_specification"]),
        ),
        (
            Picture(
                "specification",
                "Above: the difference under each choice, sorted, with its t interval, coloured where it leaves zero "
                "out; the diamond is the planned choice, the grey band counts as none. Below: which choices give it.",
            ),
        ),
    )


def _sentence(entry: Mapping[str, Any]) -> str:
    name = f"{entry['name']}, {label(entry['arm'])} minus {label(entry['reference'])}"
    if not entry["of"]:
        return f"{name}: fewer than two pairs under any choice."
    if entry["agree"] is None:
        return f"{name}: {entry['of']} choices; the planned one has no sign to agree with."
    return (
        f"{name}: {entry['agree']} of {entry['of']} choices ({number(entry['share'], 2)}) have the sign of the planned "
        f"one; of their intervals {entry['clear']} leave zero out on its side and {entry['against']} on the other."
    )
