"""What whole models and the base's circuit in them score, by each of the four scores, and which of these is primary.

Records of earlier runs lack two of the scores; of them there is no such table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.measures.scores import ENDINGS, score_of
from stages.statistics.cells import BASE, Cells, mean_of_defined
from stages.statistics.contrasts import Plan, describe
from stages.statistics.primary import CIRCUIT, is_of_score, random_shares
from stages.statistics.wording import SCORES, number, short_name

MOST_BEYOND = 0.1  # share of the prompts: above it, the accuracy of a circuit misses what it does
_SMALL = "It is the score for a vocabulary as small as the task's"
_REAL = (
    "of a real vocabulary, once everything around the circuit is ablated, the likeliest token is often no candidate at "
    "all, though the circuit still tells the answer from the others"
)
# why a score is primary
WHY = {
    "accuracy": f"the likeliest token of the whole vocabulary is what a model says. {_SMALL}; {_REAL}.",
    "candidate_accuracy": "it does not ask the circuit to make the candidates likely. Accuracy does, which is the "
    f"score for a vocabulary as small as the task's; {_REAL}. Guessing has a share of it.",
    "logit_difference": "it compares the answer with the other candidates, without a ceiling and without a share for "
    "guessing, and does not ask the circuit to make the candidates likely. Accuracy does, which is the score for a "
    f"vocabulary as small as the task's; {_REAL}.",
    "p_correct": "it says by degrees how much of the whole vocabulary's probability the answer has. Accuracy says only "
    f"whether it is the likeliest token, which is the score for a vocabulary as small as the task's; {_REAL}.",
}


def table_scores(cells: Cells, plan: Plan, left_out: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """By model: means over the seeds that count in the contrasts.

    Returns:
        for each model its seeds, and for every score: of the whole model, of the base's circuit in place, what is kept
        of the base's (`retention`), and of the base the faithfulness of its circuit and of random ones of its shape;
        none where the records lack a score.
    """
    if any(
        f"old_{score}" not in cells.record("evaluate", model, s)
        for model in cells.models
        for s in cells.seeds
        for score in ENDINGS
    ):
        return []
    counted = [seed for seed in cells.seeds if seed not in left_out]
    found = []
    for model in cells.models:
        scores, seeds = {}, 0
        for score, ending in ENDINGS.items():
            places = {
                "whole": f"evaluate.old_{score}",
                "circuit": f"{CIRCUIT}.{score}",
                "kept": f"{CIRCUIT}.retention{ending}",
            }
            places |= {"faithfulness": f"{CIRCUIT}.faithfulness{ending}"} if model == BASE else {}
            described = {name: describe(cells, plan, measure, model, left_out) for name, measure in places.items()}
            scores[score] = {name: entry["mean"] for name, entry in described.items()}
            seeds = described["whole"]["n"]
            if model == BASE:
                random = [share for seed in counted for share in random_shares(cells, BASE, seed, score)]
                scores[score]["random"] = mean_of_defined(random)
        found.append({"model": model, "seeds": seeds, "scores": scores})
    return found


def findings(table: Sequence[Mapping[str, Any]], primary: str, task: Mapping[str, Any]) -> list[str]:
    """Which score is primary and why, and whether another one says more of these circuits.

    Args:
        table: what `table_scores` gives.
        primary: the primary measure.
        task: what the old task says of itself; records of earlier runs say nothing of its candidates.
    """
    if not table:
        return []
    candidates = f" In {task['title']} the other candidates are {task['candidates']}." if "candidates" in task else ""
    score, base = score_of(primary), table[0]["scores"]
    found = [f"The primary score is the {SCORES[score]}: {WHY[score]}{candidates}"]
    if not is_of_score(primary):
        found = [
            f"The primary measure ({short_name(primary)}) is none of these scores; bases count by {SCORES[score]}."
        ]
    if base["accuracy"]["circuit"] is None:
        return found
    kept = [
        f"{number(base[name]['faithfulness'])} ({number(base[name]['random'])}) of the {said}"
        for name, said in SCORES.items()
    ]
    beyond = base["candidate_accuracy"]["circuit"] - base["accuracy"]["circuit"]
    found.append(
        f"Alone in the base, the circuit has (random circuits in brackets) {', '.join(kept[:-1])} and {kept[-1]}. For "
        f"{number(beyond)} of the prompts it makes the answer the likeliest candidate and yet another word likelier."
    )
    if beyond > MOST_BEYOND and score == "accuracy":
        found.append(
            "That is much: accuracy misses what these circuits do, and the logit difference says more of them."
        )
    return found
