"""Which heads at a position are the senders of a hop, heads that stand in for each other included.

The effects of heads do not add up. Where either of two heads is enough, patching one of them shows nothing; where
both are needed, patching one shows everything and patching the other one, too, adds nothing. So sets of heads are
measured, by patching them jointly. Let E(S) be the effect of patching the heads S of one position, A all of its
heads and C the senders. C is right if it is complete: whatever part K of it is patched, it makes little difference
whether the heads outside of C are patched as well (Wang et al. 2022, section 4, there with ablation). Here
E(K + A - C) - E(K) must be at most (1 - coverage) E(A) for

- K empty: with the senders clean, all others patched do little, so C holds everything that is needed;
- K = C: the senders alone do nearly all of E(A), so C holds the stand-ins of its own heads;
- K = one sender, and K = all senders but one: no head outside stands in for that one, or is needed beside it.

Algorithm, for one position and one kind of receivers:

1. E of every single head; it puts the heads in order. All heads of 0 are left out from here on;
2. the shortest run of the strongest heads, found by bisection, that passes the first two tests;
3. of these, those that can be dropped one by one while both tests still pass, are dropped: all of them, or else the
   weaker and then the stronger half of them, and so on down to single heads;
4. a head stays if it changes E(C) or E(A - C) by the rule's smallest effect of a head and by enough standard errors;
5. for each K of the last test that fails, steps 2 to 4 run again with K patched throughout and the heads outside of C
   as A. What they find joins C, and is tested like the other senders.

E is remembered, so nothing is patched twice. With a heads of which s are senders, the cost is a joint patches for
step 1 and about 2 log2 a + 3 s for the rest. Where senders do nothing alone step 1 puts them anywhere in the order, and
the run of step 2 is long: about 2 a more.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.scores import Metric, Scores, score

Head = tuple[int, int]  # (layer, head)
Heads = frozenset[Head]


@dataclass(frozen=True)
class Rule:
    """When a hop counts, and which heads are its senders.

    Attributes:
        minimum_effect: smallest strength of all heads together, in the unit of the metric.
        minimum_head_effect: smallest strength of what a sender adds to the other ones; far below what the coverage
            asks for, above rounding.
        noise_z: smallest strength, of all heads together and of what each sender adds, in standard errors over
            examples.
        coverage: share of the strength of all heads together that the senders must account for.
        merge_overlap: a hop whose senders have at least this Jaccard index with a group at the same position
            is no group of its own; its heads join that group.
        max_depth: longest chain of hops from the logits.
    """

    minimum_effect: float
    minimum_head_effect: float
    noise_z: float
    coverage: float
    merge_overlap: float
    max_depth: int

    def counts(self, joint: Scores) -> bool:
        """Whether all heads of a position together do something."""
        return bool(self._beats(joint, self.minimum_effect))

    def adds(self, change: Scores) -> Bool[Tensor, "*senders"]:
        """Whether what a head adds is more than nothing."""
        return self._beats(change, self.minimum_head_effect)

    def _beats(self, scores: Scores, minimum: float) -> Bool[Tensor, "*senders"]:
        return (scores.strength >= minimum) & (scores.strength >= self.noise_z * scores.noise)


def strongest(scores: Scores) -> list[Head]:
    """All heads in the order of their strength; ties in the order of layers and heads."""
    heads = scores.strength.shape[1]
    order = torch.argsort(scores.strength.flatten(), descending=True, stable=True)
    return [(int(at) // heads, int(at) % heads) for at in order]


def select_heads(
    patcher: PathPatcher,
    metric: Metric,
    rule: Rule,
    position: str,
    receivers: Receivers,
    together: Float[Tensor, "n"],
    alone: Float[Tensor, "layers h n"],
) -> tuple[Head, ...]:
    """Steps 2 to 5.

    Args:
        together: effect of all heads at once, per example.
        alone: effect of every single head (step 1).

    Returns:
        the senders, in the order in which they were found, those that were found together in the order of their
        effect alone; none where all heads together do too little to count.
    """

    def scored(effects: Float[Tensor, "*sets n"]) -> Scores:
        return score(metric, effects, patcher.clean, patcher.corrupt)

    effect = _JointEffects(patcher, position, receivers)
    live = (alone != 0).any(-1)
    order = [head for head in strongest(scored(alone)) if live[head]]
    everything = frozenset(order)
    effect.known |= {frozenset({head}): alone[head] for head in order} | {everything: together}
    if not order or not rule.counts(scored(together)):
        return ()
    found = _needed(effect, scored, rule, frozenset(), order)
    tolerated = (1 - rule.coverage) * float(scored(together).strength)
    for sender in found:  # which grows
        for patched in ({sender}, set(found) - {sender}):
            gap = scored(effect.of(everything - (set(found) - patched)) - effect.of(patched))
            if rule.counts(gap) and float(gap.strength) > tolerated:
                outside = [head for head in order if head not in found]
                found += _needed(effect, scored, rule, frozenset(patched), outside)
    return tuple(found)


class _JointEffects:
    """E: effects of sets of heads at one position on one kind of receivers, each computed once.

    Attributes:
        known: set of heads -> effect per example.
    """

    known: dict[Heads, Tensor]

    def __init__(self, patcher: PathPatcher, position: str, receivers: Receivers) -> None:
        self.known = {frozenset(): torch.zeros_like(patcher.clean)}
        self._patcher, self._position, self._receivers = patcher, position, receivers

    def of(self, heads: Iterable[Head]) -> Float[Tensor, "n"]:
        return self.of_each([frozenset(heads)])[0]

    def of_each(self, sets: Sequence[Heads]) -> Float[Tensor, "e n"]:
        new = [heads for heads in dict.fromkeys(sets) if heads not in self.known]
        if new:
            walker = self._patcher.walker
            senders = torch.zeros(len(new), walker.n_layers, walker.n_heads, dtype=torch.bool)
            for number, heads in enumerate(new):
                for head in heads:
                    senders[number][head] = True
            effects = self._patcher.effects(self._position, senders, [self._receivers])[0]
            self.known |= dict(zip(new, effects, strict=True))
        return torch.stack([self.known[heads] for heads in sets])


def _needed(
    effect: _JointEffects,
    scored: Callable[[Tensor], Scores],
    rule: Rule,
    patched: Heads,
    order: Sequence[Head],
) -> list[Head]:
    """Steps 2 to 4: which of the heads in `order`, strongest first, account for what all of them do.

    Args:
        patched: heads that are patched throughout.
    """

    def pair(senders: Sequence[Head]) -> tuple[Heads, Heads]:
        """The senders, and all heads but them."""
        return patched | set(senders), patched | (set(order) - set(senders))

    def change(sets: Iterable[Heads]) -> Float[Tensor, "e n"]:
        return effect.of_each(list(sets)) - effect.of(patched)

    def pass_both(candidates: Sequence[Sequence[Head]]) -> list[bool]:
        pairs = [pair(senders) for senders in candidates]
        strength = scored(change([heads for both in pairs for heads in both])).strength
        return ((strength[::2] >= rule.coverage * whole) & (strength[1::2] <= (1 - rule.coverage) * whole)).tolist()

    whole = scored(change([pair(order)[0]])[0]).strength
    enough, too_few = len(order), 0
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if pass_both([order[:middle]])[0]:
            enough = middle
        else:
            too_few = middle

    kept = list(order[:enough])
    without = [[head for head in kept if head != left_out] for left_out in kept]
    blocks = [[head for head, passes in zip(kept, pass_both(without), strict=True) if passes]]
    while blocks:
        block = blocks.pop()
        rest = [head for head in kept if head not in block]
        if pass_both([rest])[0]:
            kept = rest
        elif len(block) > 1:
            half = (len(block) + 1) // 2
            blocks += [block[:half], block[half:]]

    senders, others = pair(kept)
    lost = change([senders]) - change(senders - {head} for head in kept)
    left = change(others | {head} for head in kept) - change([others])
    stays = rule.adds(scored(lost)) | rule.adds(scored(left))
    return [head for head, stay in zip(kept, stays.tolist(), strict=True) if stay]
