"""The specification curve: every hypothesis again, under each other choice that could have been made.

A choice is a learning rate, a matching (a level, a KL, a norm, a number of steps), a measure, and what stands around
the circuit in place of the heads outside it (Simonsohn, Simmons and Nelson, Nature Human Behaviour 2020). All are
differences of arms paired in the seed, over the seeds whose base counts and at which both arms got to the matching.
They describe: choices are not independent, and which of them is right was decided by the plan, whose own choice is
marked. How many agree with it in sign says whether the answer hangs on it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stages.measures.scores import ABLATIONS, ENDINGS, score_of
from stages.statistics.cells import Cells
from stages.statistics.contrasts import Plan, left_out_bases
from stages.statistics.matchings import at_matching, names_of_matchings
from stages.statistics.paired import t_interval
from stages.statistics.primary import BY_ABLATION, CIRCUIT

WHOLE = "old_accuracy"  # of the whole model, around which nothing is ablated
Found = Mapping[str, Any]  # what is known of a checkpoint


@dataclass(frozen=True)
class Choice:
    """One way to ask.

    Attributes:
        rate: learning rate, as in the records.
        matching: name of the matching.
        measure: a retention of the circuit, with the ending of its score, or WHOLE.
        ablation: what stands around the circuit; None of the whole model.
    """

    rate: str
    matching: str
    measure: str
    ablation: str | None

    def of(self, found: Found) -> float | None:
        """The measure of a checkpoint; None where it is undefined or was not measured."""
        if self.ablation is None:
            return found.get(WHOLE)
        if self.ablation == ABLATIONS[0]:
            return (found.get("circuit") or {}).get(self.measure)
        return ((found.get("circuit_by_ablation") or {}).get(self.ablation) or {}).get(self.measure)


def specifications(cells: Cells, plan: Plan) -> list[dict[str, Any]]:
    """Entry `specification` of statistics.json: for each hypothesis its choices, in order of the difference.

    Returns:
        name, arm and reference of the hypothesis; `choices`, each with its `Choice`, what the matching is `by` and
        `at`, the n, mean difference and t interval, and whether it is the `planned` one; and over those with two seeds
        or more: how many there are (`of`), how many have the sign of the planned one (`agree`), and how many intervals
        leave zero out on its side (`clear`) and on the other (`against`). None where the planned one has no sign.
    """
    left_out = left_out_bases(cells, plan)
    seeds = [seed for seed in cells.seeds if seed not in left_out]
    planned = _planned(cells, plan)
    found = []
    for name, arm, reference in plan.named[: len(plan.contrasts)]:
        choices = []
        for choice in _choices(cells):
            first = cells.record("match", arm, cells.seeds[0])["matchings"][choice.matching]
            entry = asdict(choice) | {"by": first["by"], "at": first["at"], "planned": choice == planned}
            choices.append(entry | _difference(cells, seeds, choice, arm, reference, plan.confidence))
        choices = [entry for entry in choices if entry["n"]]
        choices.sort(key=lambda entry: entry["difference"])
        found.append({"name": name, "arm": arm, "reference": reference, "choices": choices, **_agreement(choices)})
    return found


def _planned(cells: Cells, plan: Plan) -> Choice | None:
    """The choice of the contrasts; None where the primary measure is no retention of a circuit in place."""
    match, parts = cells.record("match", cells.arms[0], cells.seeds[0]), plan.primary.split(".")
    where = ".".join(parts[:-1])
    ablation = ABLATIONS[0] if where == CIRCUIT else parts[2] if where.startswith(f"{BY_ABLATION}.") else None
    measure = f"retention{ENDINGS[score_of(plan.primary)]}"
    if parts[-1] != measure or ablation is None:
        if plan.primary != f"evaluate.{WHOLE}":
            return None
        measure = WHOLE
    return Choice(f"{match['learning_rate']:g}", match["matching"], measure, ablation)


def _choices(cells: Cells) -> Iterator[Choice]:
    rates = sorted(
        {
            rate
            for arm in cells.arms
            for entry in cells.record("match", arm, cells.seeds[0])["matchings"].values()
            for rate in entry["by_learning_rate"]
        },
        key=float,
    )
    for rate in rates:
        for matching in names_of_matchings(cells):
            yield Choice(rate, matching, WHOLE, None)
            for ablation in ABLATIONS:
                for ending in ENDINGS.values():
                    yield Choice(rate, matching, f"retention{ending}", ablation)


def _difference(
    cells: Cells, seeds: list[str], choice: Choice, arm: str, reference: str, confidence: float
) -> dict[str, Any]:
    differences = []
    for seed in seeds:
        pair = [at_matching(cells, model, seed, choice.matching, choice.rate) for model in (arm, reference)]
        first, second = (None if found is None else choice.of(found) for found in pair)
        if first is not None and second is not None:
            differences.append(first - second)
    n = len(differences)
    interval = t_interval(differences, confidence)
    return {
        "n": n,
        "difference": sum(differences) / n if n else None,
        "ci": None if interval is None else list(interval),
    }


def _agreement(choices: list[dict[str, Any]]) -> dict[str, int | None]:
    counted = [entry for entry in choices if entry["n"] > 1]
    planned = [entry["difference"] for entry in counted if entry["planned"]]
    if not planned or planned[0] == 0:
        return {"of": len(counted), "agree": None, "clear": None, "against": None}
    sign = 1 if planned[0] > 0 else -1
    return {
        "of": len(counted),
        "agree": sum(sign * entry["difference"] > 0 for entry in counted),
        "clear": sum(min(sign * bound for bound in entry["ci"]) > 0 for entry in counted),
        "against": sum(max(sign * bound for bound in entry["ci"]) < 0 for entry in counted),
    }
