"""When a hop of a search counts, and how much a head must do to be one of its senders."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from stages.circuits.scores import Scores


@dataclass(frozen=True)
class Rule:
    """When a hop counts, and which heads are its senders.

    Attributes:
        minimum_effect: smallest strength of heads together with which a hop, or a side of it, counts, in the unit of
            the metric.
        minimum_head_effect: smallest strength of what a sender adds to the other ones; far below what the coverage
            asks for, above rounding.
        noise_z: smallest strength, of sets of heads together and of what each sender adds, in standard errors over
            examples.
        coverage: share of the strength of all heads together, or of the stronger side, that the senders must account
            for.
        merge_overlap: a hop whose senders have at least this Jaccard index with a group at the same position and of the
            same sign is no group of its own; its heads join that group.
        max_depth: longest chain of hops from the logits.
        screen: heads that are estimated (`estimates`) to do less than this share of `minimum_head_effect` are not
            patched alone, and only three sets of heads say whether a hop counts: all, those that are estimated to work
            for the answer, and those against it; all alone where what every head is estimated to do adds up to less
            than this share of `minimum_effect`, whatever the signs. None: `gate_sets` say whether it counts, and then
            every head is patched alone; on large models that is several times the work.
        most_senders: where so many of the strongest heads do not account for the coverage, the effect is spread over
            the layers and no set of heads is its mechanism: senders are those of them that do enough alone, and what
            they leave out is the shortfall of the selection. None: as many as it takes, which in large models can be
            nearly all heads and costs several joint patches for each.
    """

    minimum_effect: float
    minimum_head_effect: float
    noise_z: float
    coverage: float
    merge_overlap: float
    max_depth: int
    screen: float | None = None
    most_senders: int | None = None

    def counts(self, joint: Scores, sign: int) -> Bool[Tensor, "*sets"]:
        """Whether heads that are patched together do something, in the direction of a sign."""
        return self._beats(joint, self.minimum_effect, sign)

    def counts_either(self, sets: Scores) -> bool:
        """Whether any of several sets of heads does something, in either direction."""
        return bool((self.counts(sets, 1) | self.counts(sets, -1)).any())

    def adds(self, change: Scores, sign: int) -> Bool[Tensor, "*senders"]:
        """Whether what a head adds is more than nothing, in the direction of a sign."""
        return self._beats(change, self.minimum_head_effect, sign)

    def _beats(self, scores: Scores, minimum: float, sign: int) -> Bool[Tensor, "*senders"]:
        strength = sign * scores.strength
        return (strength >= minimum) & (strength >= self.noise_z * scores.noise)
