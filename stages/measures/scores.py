"""The four scores of a model, or of a part of it, at work on prompts, by the names that they have in every record.

- `accuracy`: the likeliest token of the whole vocabulary is the answer. It is what the model would say, so it is the
  score where the vocabulary is as small as the task's. A real vocabulary has other words that fit, and where much is
  ablated a model may not even know that a name comes next.
- `candidate_accuracy`: the answer is likelier than every other candidate. It leaves out what makes the candidates
  likely at all, so guessing has a share of it, too.
- `logit_difference`: logit of the answer minus the mean logit of the other candidates. It has no ceiling, and grows
  with how sure a model is.
- `p_correct`: probability of the answer, over the whole vocabulary.

A share of a score (faithfulness, retention) has the score's ending after its name.
"""

from collections.abc import Mapping
from typing import Any

# score -> ending of shares of it
ENDINGS = {"accuracy": "", "candidate_accuracy": "_candidates", "logit_difference": "_ld", "p_correct": "_p"}

# what heads outside a circuit in place give, see `by_ablation`
ABLATIONS = ("own_means", "base_means", "resampled", "base_resampled")


def ratio(numerator: float, denominator: float) -> float | None:
    """Their quotient, or None where the denominator is not positive and a share of it means nothing."""
    return numerator / denominator if denominator > 0 else None


def shares(name: str, part: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, float | None]:
    """Each score of the part as a share of the whole's, as `name` with the score's ending; of the scores that both
    have, since records of earlier runs have fewer."""
    return {
        f"{name}{ending}": ratio(part[score], whole[score])
        for score, ending in ENDINGS.items()
        if score in part and score in whole
    }


def score_of(measure: str) -> str:
    """The score that a measure is, or is a share of; accuracy for all that are of no score, such as distances."""
    name = measure.rpartition(".")[2].removeprefix("old_")
    if name in ENDINGS:
        return name
    return next((score for score, ending in ENDINGS.items() if ending and name.endswith(ending)), "accuracy")
