"""Which input of the base circuit's heads, or their output, carries what tuning changed? From stage `cmap`."""

from collections.abc import Mapping
from typing import Any

from stages.statistics.cells import Cells
from stages.statistics.contrasts import Plan, describe

INPUTS = ("q", "k", "v")


def table_of_inputs(cells: Cells, plan: Plan, left_out: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Accuracy of the base alone, with each input and with the outputs of the whole circuit from the tuned model, and
    of that alone, over the seeds at which the arm counts.

    Returns:
        for each arm its seeds, and for each column mean and interval; none where the records have no inputs.
    """
    transplanted = [
        {component for component, groups in (record.get("inputs") or {}).get("tuned_to_base", {}).items() if groups}
        for (stage, *_), record in cells.records.items()
        if stage == "cmap"
    ]
    inputs = [component for component in INPUTS if any(component in found for found in transplanted)]
    if not inputs:
        return []
    measures = {"base": "cmap.base_accuracy"}
    measures |= {component: f"cmap.inputs.tuned_to_base.{component}.circuit.accuracy" for component in inputs}
    measures |= {"outputs": "cmap.tuned_to_base.circuit.accuracy", "tuned": "cmap.tuned_accuracy"}
    found = []
    for arm in cells.arms:
        described = {name: describe(cells, plan, measure, arm, left_out) for name, measure in measures.items()}
        found.append(
            {"arm": arm, "seeds": described["outputs"]["n"]}
            | {name: {key: entry[key] for key in ("mean", "ci")} for name, entry in described.items()}
        )
    return found
