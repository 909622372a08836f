"""What a model's precision does to the ranking of its heads, asked of the heads that send to the logits.

A patch changes the residual stream by little, and in bfloat16 the stream has eight bits: an effect is then a difference
of two rounded numbers, and that of a head which does next to nothing is rounding alone. So a search in bfloat16 says
how far the first hop ranks the heads as float32 does, on a few of its own examples.

Measured on SmolLM2-135M-Instruct (Q4_1) and IOI, 16 / 32 / 64 pairs of 14 tokens: all 270 heads .72 / .65 / .70
(Spearman), the 27 / 23 / 23 that do .005 or more in float32 .993 / .999 / .998; 9 / 10 / 9 of the 10 strongest are the
same, and no score, a share of the whole effect, differs by more than .0042.
"""

from typing import Any

from stages.circuits.agreement import agreement
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher
from stages.circuits.readout import Measure
from stages.circuits.scores import Metric, Scores
from stages.circuits.walker import Walker


def first_hop(
    walker: Walker, pairs: AlignedPairs, measure: Measure, metric: Metric, position: str, memory_mib: float
) -> Scores:
    """Scores of all heads at a position that send to the logits.

    Raises:
        Invalid: as `PathPatcher`.
    """
    return PathPatcher(walker, pairs, measure, memory_mib).scores(position, "logits", metric)


def rank_agreement(exact: Scores, rounded: Scores, examples: int, least: float) -> dict[str, Any]:
    """How alike both rank the heads, as an entry of a record: all of them, and those that do much; the strongest move
    the answer most towards that of the corrupt prompt.

    Args:
        exact: scores in float32.
        rounded: of the same heads and examples in another precision.
        examples: how many these were.
        least: the smallest score in float32 of a head that does much.
    """
    much = exact.score.abs() >= least
    of_much = agreement(exact.strength.where(much, 0), rounded.strength.where(much, 0), ())
    found = agreement(exact.strength, rounded.strength, (10,))
    return {
        "reference": "float32",
        "examples": examples,
        "heads": found.n,
        "spearman": found.spearman,
        "largest_difference": found.largest_difference,
        "shared_of_10_strongest": found.top.get(10),
        "least": least,
        "heads_of_least": of_much.n,
        "spearman_of_least": of_much.spearman,
    }
