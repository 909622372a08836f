"""Does learning more of the same task enhance the mechanism that is there? The question of Prakash et al. (ICLR 2024).

They find the circuit of Llama-7B, which answers two thirds of the prompts, and put the same heads in place in three
of its fine-tuned versions, which answer more. Here the new task is the old one and the bases are stopped half-trained
(`new_task: contains`, `pretrain.stop_at`), so that the same numbers can be stated of our models.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from stages.statistics.cells import Cells

SAME_TASK = "contains"
SOURCE = "Prakash et al. (ICLR 2024), table 1"
# Of SOURCE: entity tracking with 7 boxes: accuracy of the whole model, of Llama-7B's
# circuit of 72 heads in place in it, and of random circuits of the same size. Goat-7B's adapters of the output
# projections were not part of what was patched.
PUBLISHED = {
    "Llama-7B": (0.66, 0.66, 0.00),
    "Vicuna-7B": (0.67, 0.65, 0.00),
    "Goat-7B": (0.82, 0.73, 0.01),
    "FLoat-7B": (0.82, 0.72, 0.01),
}


def table_of_models(cells: Cells) -> list[dict[str, Any]]:
    """Accuracies of whole model, base's circuit in place, own circuit and random circuits: means over the seeds of
    every model, then the published ones, which are of one model each."""
    found = []
    for model in cells.models:
        random = [cells.record("evaluate", model, seed).get("random") or {} for seed in cells.seeds]
        found.append(
            {
                "model": model,
                "source": None,
                "seeds": len(cells.seeds),
                "model_accuracy": _mean(_values(cells, "evaluate.old_accuracy", model)),
                "circuit_accuracy": _mean(_values(cells, "evaluate.circuit.accuracy", model)),
                "faithfulness": _mean(_values(cells, "evaluate.circuit.faithfulness", model)),
                "own_accuracy": _mean(_values(cells, "evaluate.own_circuit.accuracy", model)),
                "random_accuracy": _mean(record.get("mean") for record in random),
            }
        )
    for model, (whole, circuit, random_circuits) in PUBLISHED.items():
        found.append(
            {
                "model": model,
                "source": SOURCE,
                "seeds": None,
                "model_accuracy": whole,
                "circuit_accuracy": circuit,
                "faithfulness": circuit / whole,
                "own_accuracy": None,
                "random_accuracy": random_circuits,
            }
        )
    return found


def table_of_transplants(cells: Cells) -> list[dict[str, Any]]:
    """What the tuned heads of each group do in the weaker base: mean accuracies over the seeds that have the group."""
    found = []
    for arm in cells.arms:
        records = [cells.record("cmap", arm, seed) for seed in cells.seeds]
        for group in dict.fromkeys(group for record in records for group in record.get("tuned_to_base") or {}):
            having = [record for record in records if group in (record.get("tuned_to_base") or {})]
            random = [((r.get("random") or {}).get("tuned_to_base") or {}).get(group) or {} for r in having]
            found.append(
                {
                    "arm": arm,
                    "group": group,
                    "seeds": len(having),
                    "base": _mean(record["base_accuracy"] for record in having),
                    "transplanted": _mean(record["tuned_to_base"][group]["accuracy"] for record in having),
                    "random": _mean(entry.get("accuracy") for entry in random),
                    "tuned": _mean(record["tuned_accuracy"] for record in having),
                }
            )
    return found


def _values(cells: Cells, measure: str, model: str) -> list[float | None]:
    return [cells.value(measure, model, seed) for seed in cells.seeds]


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
