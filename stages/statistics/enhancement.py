"""Does learning more of the same task enhance the mechanism that is there? The question of Prakash et al. (ICLR 2024).

They find the circuit of Llama-7B, which answers two thirds of the prompts, and put the same heads in place in three
of its fine-tuned versions, which answer more. Here the new task is the old one and the bases are stopped half-trained
(of entity tracking `new_task: contains`, `pretrain.stop_at`), so that the same numbers can be stated of our models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.statistics.cells import BASE, Cells, mean_of_defined
from stages.statistics.frames import transplants
from stages.statistics.wording import number

PUBLISHED_TASK = "boxes"  # the old task of what is published
SOURCE = "Prakash et al. (ICLR 2024), table 1"
LEAST_GAIN = 0.05  # in accuracy: an arm that gains less is not called better than the base
# Of SOURCE: entity tracking with 7 boxes: accuracy of the whole model, of Llama-7B's
# circuit of 72 heads in place in it, and of random circuits of the same size. Goat-7B's adapters of the output
# projections were not part of what was patched.
PUBLISHED = {
    "Llama-7B": (0.66, 0.66, 0.00),
    "Vicuna-7B": (0.67, 0.65, 0.00),
    "Goat-7B": (0.82, 0.73, 0.01),
    "FLoat-7B": (0.82, 0.72, 0.01),
}


def table_of_models(cells: Cells, old_task: str) -> list[dict[str, Any]]:
    """Accuracies of whole model, base's circuit in place, own circuit and random circuits: means over the seeds of
    every model, then the published ones of the same old task, which are of one model each."""
    found = []
    for model in cells.models:
        random = [cells.record("evaluate", model, seed).get("random") or {} for seed in cells.seeds]
        found.append(
            {
                "model": model,
                "source": None,
                "seeds": len(cells.seeds),
                "model_accuracy": mean_of_defined(_values(cells, "evaluate.old_accuracy", model)),
                "circuit_accuracy": mean_of_defined(_values(cells, "evaluate.circuit.accuracy", model)),
                "faithfulness": mean_of_defined(_values(cells, "evaluate.circuit.faithfulness", model)),
                "own_accuracy": mean_of_defined(_values(cells, "evaluate.own_circuit.accuracy", model)),
                "random_accuracy": mean_of_defined(record.get("mean") for record in random),
            }
        )
    published = PUBLISHED if old_task == PUBLISHED_TASK else {}
    for model, (whole, circuit, random_circuits) in published.items():
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
    frame = transplants(cells)
    into_base = frame[frame["direction"] == "tuned_to_base"]
    columns = {"receiver": "base", "accuracy": "transplanted", "random": "random", "donor": "tuned"}
    found = []
    groups: Any = into_base.groupby(["model", "group"], sort=False)
    for (arm, group), rows in groups:
        means = {name: mean_of_defined(rows[column].dropna().tolist()) for column, name in columns.items()}
        found.append({"arm": arm, "group": group, "seeds": len(rows)} | means)
    return found


def findings(
    models: Sequence[Mapping[str, Any]], heads: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> list[str]:
    """What the two tables say, in a sentence each: does the base's circuit do the work of the better models, and do
    their heads lift the base more than as many random ones? Arms that learned nothing are not named.

    Args:
        models, heads: what `table_of_models` and `table_of_transplants` give.
        names: model -> its name for people.
    """
    ours = {entry["model"]: entry for entry in models if not entry["source"]}
    base = ours.pop(BASE)
    better = {
        arm: entry
        for arm, entry in ours.items()
        if None not in (entry["model_accuracy"], base["model_accuracy"], entry["circuit_accuracy"])
        and entry["model_accuracy"] > base["model_accuracy"] + LEAST_GAIN
    }
    if not better:
        return [f"No arm answers more than the base ({number(base['model_accuracy'], 2)})."]
    alone = ", ".join(
        f"{number(entry['circuit_accuracy'], 2)} in {names[arm]} ({number(entry['model_accuracy'], 2)})"
        for arm, entry in better.items()
    )
    found = [
        "Alone, everything else mean-ablated, the base's circuit answers (in brackets the whole model) "
        f"{number(base['circuit_accuracy'], 2)} in the base ({number(base['model_accuracy'], 2)}) and {alone}."
    ]
    lifted = ", ".join(
        f"{number(entry['transplanted'], 2)} with those of {names[entry['arm']]} (random heads "
        f"{number(entry['random'], 2)})"
        for entry in heads
        if entry["group"] == "circuit" and entry["arm"] in better
    )
    if lifted:
        found.append(
            f"The tuned outputs of the circuit's heads, put into the base, lift it from "
            f"{number(base['model_accuracy'], 2)} to {lifted}."
        )
    return found


def _values(cells: Cells, measure: str, model: str) -> list[float | None]:
    return [cells.value(measure, model, seed) for seed in cells.seeds]
