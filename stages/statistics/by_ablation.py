"""What was lost in the base's circuit, and what around it: the circuit in place with the model's own outputs around it
and with those of its base.

Retention is of what the same circuit does in the base with the same kind of outputs around it (means or resampled
ones). What is lost although the base's outputs are around it is lost in the circuit: in its heads, or in what stays
live beside them (MLPs, embeddings, norms). What these outputs bring back was lost around it. The two add up to the
whole loss. That is one way to divide it: where heads and surroundings changed together, each alone may do worse than
both.
Records of earlier runs have no other outputs; of them there is no such table.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stages.measures.scores import ABLATIONS, ENDINGS, score_of
from stages.statistics.cells import BASE, Cells, mean_of_defined
from stages.statistics.contrasts import Plan
from stages.statistics.paired import t_interval
from stages.statistics.primary import BY_ABLATION
from stages.statistics.wording import SCORES, number

# outputs around the circuit -> the kinds with the model's own and with the base's, and the words for them
AROUND = {
    "means": ("own_means", "base_means", "means"),
    "resampled": ("resampled", "base_resampled", "resampled outputs"),
}
LEAST_LOST = 0.05  # of what the circuit does in the base: an arm that loses less is not said to lose it somewhere


def table_ablations(cells: Cells, plan: Plan, left_out: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """By model, in the score of the primary measure: means over the seeds that count in the contrasts.

    Returns:
        for each model its seeds, faithfulness with every kind of outputs, `from_donor` with resampled ones, and for an
        arm, with means and with resampled outputs: seeds at which both are defined, what is kept with its own outputs
        around the circuit, and what was lost in the circuit and around it, with t intervals; none where the records
        have no such kinds.
    """
    if not any(
        cells.record("evaluate", model, seed).get("circuit_by_ablation")
        for model in cells.models
        for seed in cells.seeds
    ):
        return []
    ending = ENDINGS[score_of(plan.primary)]
    found = []
    for model in cells.models:
        seeds = [s for s in cells.seeds if s not in left_out and (model == BASE or cells.reached(model, s))]

        def values(kind: str, name: str, model: str = model, seeds: Sequence[str] = seeds) -> list[float | None]:
            return [cells.value(f"{BY_ABLATION}.{kind}.{name}", model, seed) for seed in seeds]

        entry = {"model": model, "seeds": len(seeds)}
        entry["faithfulness"] = {kind: mean_of_defined(values(kind, f"faithfulness{ending}")) for kind in ABLATIONS}
        entry["from_donor"] = {kind: mean_of_defined(values(kind, "from_donor")) for kind in AROUND["resampled"][:2]}
        entry["lost"] = None if model == BASE else _lost(values, f"retention{ending}", plan.confidence)
        found.append(entry)
    return found


def _lost(
    values: Callable[[str, str], list[float | None]], retention: str, confidence: float
) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (own, base, _) in AROUND.items():
        both = zip(values(own, retention), values(base, retention), strict=True)
        pairs = [
            (with_own, with_base) for with_own, with_base in both if with_own is not None and with_base is not None
        ]
        parts = {
            "kept": [with_own for with_own, _ in pairs],
            "in_circuit": [1 - with_base for _, with_base in pairs],
            "around": [with_base - with_own for with_own, with_base in pairs],
        }
        found[name] = {"n": len(pairs)} | {
            part: {"mean": mean_of_defined(x), "ci": list(t_interval(x, confidence) or ()) or None}
            for part, x in parts.items()
        }
    return found


def findings(table: Sequence[Mapping[str, Any]], primary: str, names: Mapping[str, str]) -> list[str]:
    """How well the base's circuit works with each kind of outputs around it, and where every arm lost what it did.

    Args:
        table: what `table_ablations` gives.
        primary: the primary measure.
        names: model -> its name for people.
    """
    if not table:
        return []
    base, said = table[0], SCORES[score_of(primary)]
    faithfulness = base["faithfulness"]
    found = []
    if None not in (faithfulness["own_means"], faithfulness["resampled"], base["from_donor"]["resampled"]):
        found.append(
            f"Alone in the base, the circuit has {number(faithfulness['own_means'])} of its {said} with means around "
            f"it and {number(faithfulness['resampled'])} with resampled outputs, where "
            f"{number(base['from_donor']['resampled'])} of the prompts are answered with a word that stands in the "
            "other prompt alone."
        )
    for kind, (_, _, words) in AROUND.items():
        places: dict[str, list[str]] = {"in": [], "around": [], "nowhere": []}
        for entry in table[1:]:
            lost, name = entry["lost"][kind], names[entry["model"]]
            if not lost["n"]:
                continue
            inside, around = lost["in_circuit"]["mean"], lost["around"]["mean"]
            text = f"{name} ({number(inside, signed=True)} in it, {number(around, signed=True)} around it)"
            if 1 - lost["kept"]["mean"] < LEAST_LOST:
                places["nowhere"].append(text)
            else:
                places["in" if inside >= around else "around"].append(text)
        parts = [
            f"{what} was lost {how}in {', '.join(places[where])}"
            for where, what, how in (
                ("in", "more", "in it than around it "),
                ("around", "more", "around it than in it "),
                ("nowhere", f"less than {number(LEAST_LOST, 2)}", ""),
            )
            if places[where]
        ]
        if parts:
            found.append(
                f"With {words} around the circuit, on average {'; '.join(parts)} (shares of what it did in the base)."
            )
    return found
