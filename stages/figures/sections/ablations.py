"""Scores and ablations: by which score the circuit is judged, and what was lost in it and what around it."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Section, Table
from stages.figures.sections.formatting import mean_interval
from stages.figures.style import label
from stages.measures.scores import ABLATIONS
from stages.statistics.wording import ABLATIONS as WORDS
from stages.statistics.wording import SCORES, number


def section(summary: Mapping[str, Any]) -> Section:
    """The base's circuit in every model, by score and by what is around it; only of records that have either."""
    scores, ablations = summary["table_scores"], summary["table_ablations"]
    said = SCORES[summary["primary_score"]]
    return Section(
        "Which score, and what is around the circuit?",
        (*summary["score_findings"], *summary["ablation_findings"]),
        tables=(
            *((_by_score(scores),) if scores else ()),
            *((_by_ablation(ablations, said), _lost(ablations, said)) if ablations else ()),
        ),
    )


def _by_score(entries: list[dict[str, Any]]) -> Table:
    return Table(
        "The old task by four scores: whole model / the base's circuit in place, with the model's own means around it "
        "/ the share of what that circuit has in the base. Accuracy and probability are over the whole vocabulary; "
        "the logit difference is the answer's logit minus the mean of the other candidates'. Means over the seeds "
        "that count in the contrasts.",
        ("Model", "Seeds", *(f"{name[0].upper()}{name[1:]}" for name in SCORES.values())),
        [
            (
                label(e["model"]),
                str(e["seeds"]),
                *(
                    " / ".join(number(e["scores"][score][part]) for part in ("whole", "circuit", "kept"))
                    for score in SCORES
                ),
            )
            for e in entries
        ],
    )


def _by_ablation(entries: list[dict[str, Any]], said: str) -> Table:
    kinds = ("resampled", "base_resampled")
    return Table(
        f"The base's circuit in place as a share of the whole model's {said}, by what all other heads give: their "
        "means in the model or in its base, or their outputs there in the corrupt partner of each prompt (resampled). "
        "A mean says nothing of any answer; resampled heads speak for another one, so that what a circuit lacks counts "
        "against it. Last: for how many prompts the likeliest word stands in the partner alone. Means over the seeds "
        "that count in the contrasts.",
        ("Model", "Seeds", *(WORDS[kind] for kind in ABLATIONS), *(f"partner's word, {WORDS[kind]}" for kind in kinds)),
        [
            (
                label(e["model"]),
                str(e["seeds"]),
                *(number(e["faithfulness"][kind]) for kind in ABLATIONS),
                *(number(e["from_donor"][kind]) for kind in kinds),
            )
            for e in entries
        ],
    )


def _lost(entries: list[dict[str, Any]], said: str) -> Table:
    around = ("means", "resampled")
    return Table(
        f"What was lost in the circuit, and what around it: shares of the {said} of the base's circuit in the base, "
        "with the same kind of outputs around it. Lost in the circuit (its heads, and what stays live beside them: "
        "MLPs, embeddings, norms) is what is missing with the base's outputs around it, too; lost around it is what "
        "these bring back, compared with the model's own. Kept and both losses add up to 1. A loss around the circuit "
        "below 0: the circuit does better among the model's own outputs than among the base's, so the two changed "
        "together. Means with t intervals over the seeds that count in the contrasts.",
        (
            "Arm",
            "Seeds",
            "Kept, means",
            "Lost in the circuit",
            "Lost around it",
            "Kept, resampled",
            "Lost in the circuit",
            "Lost around it",
        ),
        [
            (
                label(e["model"]),
                str(e["seeds"]),
                *(
                    text
                    for lost in (e["lost"][name] for name in around)
                    for text in (
                        number(lost["kept"]["mean"]),
                        *(mean_interval(lost[p], True) for p in ("in_circuit", "around")),
                    )
                ),
            )
            for e in entries
            if e["lost"] is not None
        ],
    )
