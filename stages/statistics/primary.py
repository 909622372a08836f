"""What follows from the choice of the primary measure: its score, and by which number a base counts.

Which score is primary depends on task and vocabulary (see `measures.scores`), so a param says it. A base whose circuit
does not work in place cannot say what fine-tuning keeps of it: it counts by the faithfulness of the same score, with
the same ablation.
"""

from stages.measures.scores import ENDINGS, score_of
from stages.statistics.cells import BASE, Cells, mean_of_defined

CIRCUIT, BY_ABLATION = "evaluate.circuit", "evaluate.circuit_by_ablation"


def is_of_score(measure: str) -> bool:
    """Whether a measure is one of the scores, of anything, or a share of one."""
    name = measure.rpartition(".")[2]
    return any(score in name for score in ("retention", "faithfulness", *ENDINGS))


def base_measure(primary: str) -> str:
    """The faithfulness by which a base counts."""
    parts = primary.split(".")
    circuit = ".".join(parts[:3]) if primary.startswith(f"{BY_ABLATION}.") else CIRCUIT
    return f"{circuit}.faithfulness{ENDINGS[score_of(primary)]}"


def random_shares(cells: Cells, model: str, seed: str, score: str) -> list[float]:
    """Faithfulness of each random circuit of a model by a score."""
    record = cells.record("evaluate", model, seed).get("random") or {}
    return [value for value in record.get(f"faithfulness{ENDINGS[score]}") or [] if value is not None]


def above_chance(cells: Cells, seed: str, score: str) -> list[float]:
    """The same of a base, of candidate accuracy the share of what is above guessing, where the record says what that
    scores."""
    found, record = random_shares(cells, BASE, seed, score), cells.record("evaluate", BASE, seed)
    whole, chance = record.get("old_candidate_accuracy"), record.get("old_chance")
    if score != "candidate_accuracy" or whole is None or chance is None or whole <= chance:
        return found
    return [(share * whole - chance) / (whole - chance) for share in found]


def random_floor(cells: Cells, primary: str, seeds: list[str]) -> float | None:
    """What random circuits of the same shape have in the bases of these seeds, in the unit of the primary measure if
    that is of the circuit in place with the model's own means, else None."""
    score = score_of(primary)
    ending = ENDINGS[score]
    values: list[float | None] = []
    for seed in seeds:
        null = mean_of_defined(random_shares(cells, BASE, seed, score))
        circuit = cells.value(f"{CIRCUIT}.faithfulness{ending}", BASE, seed)
        if primary == f"{CIRCUIT}.retention{ending}" and null is not None and circuit:
            values.append(null / circuit)
        elif primary == f"{CIRCUIT}.faithfulness{ending}":
            values.append(null)
    return mean_of_defined(values)
