"""How far path patching in bfloat16 ranks heads as float32 does, of all models that were looked into so."""

from typing import Any

from stages.statistics.cells import Cells, mean_of_defined
from stages.statistics.wording import number


def table_of_precision(cells: Cells) -> list[dict[str, Any]]:
    """One row, over all models: of each agreement the mean and the lowest; none where all were in float32."""
    found = [cells.record("discover", model, seed).get("precision") for model in cells.models for seed in cells.seeds]
    records = [record for record in found if record is not None]
    if not records:
        return []
    row: dict[str, Any] = {"models": len(records), "examples": records[0]["examples"], "least": records[0]["least"]}
    for name in ("spearman", "spearman_of_least", "shared_of_10_strongest"):
        defined = [record[name] for record in records if record[name] is not None]
        row |= {name: mean_of_defined(defined), f"{name}_lowest": min(defined, default=None)}
    return [row | {"largest_difference": max(record["largest_difference"] for record in records)}]


def findings(table: list[dict[str, Any]]) -> list[str]:
    """A sentence on what `table_of_precision` gives; none of nothing."""
    return [
        f"Models were looked into in bfloat16, and {row['models']} of them in float32, too, on {row['examples']} "
        f"prompts: the heads that send to the logits rank alike by {number(row['spearman'])} (Spearman, mean; lowest "
        f"{number(row['spearman_lowest'])}), those with a score of {row['least']:g} or more in float32 by "
        f"{number(row['spearman_of_least'])} ({number(row['spearman_of_least_lowest'])}); of the ten strongest "
        f"{number(row['shared_of_10_strongest'], 2)} are the same ({number(row['shared_of_10_strongest_lowest'], 2)}), "
        f"and no score differs by more than {number(row['largest_difference'], 4)}."
        for row in table
    ]
