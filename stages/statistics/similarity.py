"""How alike base and tuned circuits are, by arm, between a floor and a ceiling.

The floor is what two bases have that were trained from different weights: the same task and shape, other heads. It is
computed here from the records of the bases, since no cell sees two of them. Savings compare the steps of relearning
with those the base took at first (see `measures/relearning.py`), known to the check of its training curve.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.measures.edge_scores import EdgeScores
from stages.measures.overlap import SCORES, node_grid, overlap_curve
from stages.measures.similarity import KINDS
from stages.measures.similarity import floor as similarity_floor
from stages.statistics.cells import BASE, Cells, mean_of_defined
from stages.statistics.contrasts import Plan, describe, left_out_bases

_TOGETHER, _AT, _EDGES = (f"drift.retraced.{part}" for part in ("similarity.together", "overlap.at_circuit", "edges"))

# name -> where a cell's number stands
MEASURES = {
    **{
        f"{kind}{suffix}": f"{_TOGETHER}.{kind}.{entry}"
        for kind in ("cosine", "spearman")
        for suffix, entry in (("", "value"), ("_ceiling", "ceiling"), ("_null", "null_mean"))
    },
    **{f"overlap_{name}": f"{_AT}.{name}" for name in ("share", "layered", "corrected", "ceiling_corrected")},
    **{
        f"edges_{name}": f"{_EDGES}.together.{name}"
        for name in ("change", "flipped", "weakened", "weakened_noise", "new", "new_noise")
    },
    "cka": "drift.cka.mean",
    "relearning_steps": "drift.relearning.steps",
}


def base_effects(cells: Cells, root: Path) -> dict[str, EdgeScores]:
    """Seed -> the base's effects, where it has any."""
    found = {}
    for seed in cells.seeds:
        with np.load(root / "discover" / BASE / seed / "scores.npz") as arrays:
            effects = EdgeScores.of(cells.record("discover", BASE, seed)["hops"], dict(arrays))
        if effects is not None:
            found[seed] = effects
    return found


def compare_circuits(cells: Cells, plan: Plan, root: Path) -> dict[str, Any]:
    """The entry "similarity" of statistics.json.

    Returns:
        arms: arm -> name of the measure -> mean, interval and values over seeds; with savings;
        floor: kind of similarity -> mean over pairs of bases; curve: sizes with each score; pairs: how many.
    """
    left_out = left_out_bases(cells, plan)
    arms = {
        arm: {name: describe(cells, plan, path, arm, left_out) for name, path in MEASURES.items()}
        | {"savings": savings(cells, left_out, root, arm)}
        for arm in cells.arms
    }
    bases = {seed: effects for seed, effects in base_effects(cells, root).items() if seed not in left_out}
    return {"arms": arms, "floor": floor(bases)}


def floor(bases: Mapping[str, EdgeScores]) -> dict[str, Any]:
    """Means over all pairs of bases that share a hop; the curve as far as it goes in every pair."""
    pairs = [pair for one, other in combinations(bases.values(), 2) if (pair := one.matched(other)) is not None]
    found = [similarity_floor(*pair) or {} for pair in pairs]
    grid = [k for k in (node_grid(pairs[0][0]) if pairs else []) if all(k in node_grid(one) for one, _ in pairs)]
    curves = [overlap_curve(*pair, grid) for pair in pairs]
    return {
        "pairs": len(pairs),
        "similarity": {kind: mean_of_defined([entry[kind] for entry in found]) for kind in KINDS},
        "sizes": grid,
        "overlap": {
            name: [mean_of_defined([curve[name][i] for curve in curves]) for i in range(len(grid))] for name in SCORES
        },
    }


def savings(cells: Cells, left_out: Collection[str], root: Path, arm: str) -> dict[str, Any]:
    """1 - steps / steps at first, over the seeds that count and regained the old task."""
    values = {}
    counted = [seed for seed in cells.seeds if seed not in left_out and cells.reached(arm, seed)]
    for seed in counted:
        record = cells.record("drift", arm, seed).get("relearning") or {}
        curve = pd.read_csv(root / "pretrain" / seed / "curve.csv")
        passed = curve["accuracy"].to_numpy() >= record.get("target", np.inf)
        if record.get("steps") is not None and passed.any():
            values[seed] = 1 - record["steps"] / float(curve["step"].to_numpy()[passed.argmax()])
    return {"n": len(values), "of": len(counted), "mean": mean_of_defined(list(values.values())), "values": values}


def table(statistics: Mapping[str, Any], arms: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each arm: the mean of every measure, the interval of the first ones, and the floor."""
    found = statistics["similarity"]
    rows = []
    for arm in arms:
        measures = found["arms"][arm]
        row: dict[str, Any] = {"arm": arm, "n": measures["cosine"]["n"]}
        row |= {name: entry["mean"] for name, entry in measures.items()}  # savings, too
        row |= {f"{name}_ci": measures[name]["ci"] for name in ("cosine", "spearman", "overlap_corrected")}
        row |= {f"{kind}_floor": found["floor"]["similarity"][kind] for kind in ("cosine", "spearman")}
        rows.append(row)
    return rows


def similarities(cells: Cells) -> pd.DataFrame:
    """model, seed, reached, kind, value, ceiling, null: of all hops together, where identifiable."""
    rows = []
    for arm in cells.arms:
        for seed in cells.seeds:
            found = (cells.record("drift", arm, seed).get("retraced") or {}).get("similarity") or {"together": {}}
            for kind, entry in found["together"].items():
                values = {"value": entry["value"], "ceiling": entry["ceiling"], "null": entry["null_mean"]}
                rows.append({"model": arm, "seed": seed, "reached": cells.reached(arm, seed), "kind": kind} | values)
    columns = ["model", "seed", "reached", "kind", "value", "ceiling", "null"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[4:], "float64"))


def overlap_curves(cells: Cells) -> pd.DataFrame:
    """model, seed, reached, size, share, ceiling, chance (sets with as many nodes of each layer)."""
    rows = []
    for arm in cells.arms:
        for seed in cells.seeds:
            found: dict[str, Any] = (cells.record("drift", arm, seed).get("retraced") or {}).get("overlap") or {}
            for index, size in enumerate(found.get("sizes", [])):
                observed, ceiling = found["observed"], found["ceiling"]
                scores = [entry[index] for entry in (observed["share"], ceiling["share"], observed["layered"])]
                rows.append((arm, seed, cells.reached(arm, seed), size, *scores))
    columns = ["model", "seed", "reached", "size", "share", "ceiling", "chance"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[4:], "float64"))
