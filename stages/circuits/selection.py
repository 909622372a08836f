"""Which heads at a position are the senders of a hop: those that work for the answer and those that work against it,
heads that stand in for each other and heads that cancel each other included.

The effects of heads do not add up. Where either of two heads is enough, patching one of them shows nothing; where
both are needed, patching one shows everything and patching the other one, too, adds nothing. And where one head undoes
what another one does, patching both shows nothing. So sets of heads are measured, by patching them jointly. Let E(S) be
the effect of patching the heads S of one position, A all of its heads and C the senders. C is right if it is complete:
whatever part K of it is patched, it makes little difference whether the heads outside of C are patched as well (Wang et
al. 2022, section 4, there with ablation): E(K + A - C) - E(K) is small, in either direction.

*Does the hop count?* All heads together do nothing where heads cancel. So beside all of them some sets of them are
patched (`screening.gate_sets`): every head has a code word of m bits of which half are 1, another one for each head,
and set b holds the heads with a 1 at bit b. Of any two heads each is in a set without the other one (with running
numbers as code words only one of them would be, which may be the one that does nothing alone). The hop counts if any of
these sets does enough, in either direction. With 270 heads these are 12 tests of which one must be beyond noise_z
standard errors: with 4, chance passes one hop in 1,300 at normal errors, and one that it passes has no senders unless a
side counts.

*Two sides.* A head is surely for the answer (a set P), or surely against it (N), if its own effect is enough in that
direction; others may do something only together. The tolerance of a hop, what need not be accounted for, is
(1 - coverage) times the largest |E| of A, A - N, A - P, P and N. A side counts if it does enough in its direction, and
more than the tolerance: for the answer that is A - N, or P alone where a head of no effect of its own undoes it;
against it, A - P or N alone. Its senders are looked for in the one of these that counts, with the other heads clean
and, for those against the answer, with the sign of E turned; a head that was found on one side is clean on the other
one. Where only one side counts, weak heads of the other one may be stand-ins in company: its senders are looked for in
A, and the tolerance is (1 - coverage) |E(A)|, if A does enough in its direction.

Algorithm for one side U with senders C. E(K + U - C) - E(K) must be at most the tolerance for

- K empty: with the senders clean, all others patched do little, so C holds everything that is needed;
- K = C: the senders alone do nearly all of E(U), so C holds the stand-ins of its own heads;
- K = one sender, and K = all senders but one: no head outside stands in for that one, or is needed beside it.

1. E of every single head below the highest receiver; it puts the heads in order. One of 0 may have a stand-in;
2. where the rule has a most and so many of the strongest heads do not pass the first two tests, C is those of them
   that do enough alone, and nothing more is asked. Else the shortest run of the strongest heads that passes: of those
   that do enough alone, if these pass, else of all. It is looked for from where the single effects add up to enough,
   in steps that double, and then by bisection;
3. of these, heads are dropped while both tests still pass: first those that do too little alone, then those whose
   single loss the tests pass. All of them go, or else the weaker and then the stronger half of them, and so on down
   to single heads, or to parts that together do too little by the measure of step 4;
4. a head stays if it changes E(C) or E(U - C) by the rule's smallest effect of a head and by enough standard errors;
5. for each K of the last test that fails by more than noise, steps 2 to 4 run again with K patched throughout and the
   heads outside of C as U (what may be missing stays the same). What they find joins C, and is tested like the other
   senders.

Then the sides together: |E(A - C)| and |E(A) - E(C)| must be within the tolerance, with C the senders of both sides.
For one that is not, steps 2 to 4 run again with K patched throughout and the heads outside of C as U, in the direction
of what is left out, if that is beyond noise. What is then still outside of the tolerance is kept with the result as its
shortfall.

E is remembered, so nothing is patched twice. With a heads of which s are senders, the cost is a joint patches for
step 1 and about 3 s for the rest. Where senders do nothing alone step 1 puts them anywhere in the order, and the run of
step 2 is long: 4 log2 a and about 2 a more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.circuits.needed_heads import Head, HeadSet, JointEffects, Scored, needed
from stages.circuits.patcher import Patcher
from stages.circuits.rule import Rule
from stages.circuits.scores import Metric, Scores
from stages.circuits.sweep import Receivers

BEYOND = 2.0  # standard errors over the tolerance at which a last test fails: at the tolerance noise decides
ROUNDS = 4  # of looking again for what the two sides together leave out; what is found joins, so few are needed


@dataclass(frozen=True)
class Selection:
    """The senders of a hop.

    Attributes:
        senders: sign -> (layer, head) pairs, in the order in which they were found, those that were found together in
            the order of their effect alone. +1: patching them moves the measure towards the corrupt run, so they raise
            it; -1: they lower it.
        tolerance: strength that need not be accounted for.
        left: strength of all heads outside, E(A - C), and its standard error.
        missing: strength that the senders lack, E(A) - E(C), and its standard error; below 0 where they do too much.
    """

    senders: dict[int, tuple[Head, ...]]
    tolerance: float
    left: tuple[float, float]
    missing: tuple[float, float]

    @property
    def shortfall(self) -> float:
        """By how much the worse of the two is outside of the tolerance; 0 where both are inside."""
        return max(0.0, abs(self.left[0]) - self.tolerance, abs(self.missing[0]) - self.tolerance)


def strongest(scores: Scores, sign: int = 1) -> list[Head]:
    """All heads in the order of their strength in the direction of a sign; ties in the order of layers and heads."""
    heads = scores.strength.shape[1]
    order = torch.argsort(sign * scores.strength.flatten(), descending=True, stable=True)
    return [(int(at) // heads, int(at) % heads) for at in order]


def select_heads(
    patcher: Patcher,
    metric: Metric,
    rule: Rule,
    position: str,
    receivers: Receivers,
    together: Float[Tensor, "n"],
    alone: Float[Tensor, "layers h n"],
    first: int = 1,
    patched: Bool[Tensor, "layers h"] | None = None,
) -> Selection:
    """Both sides, and what they leave out together.

    Args:
        together: effect of all heads at once, per example.
        alone: effect of every single head (step 1).
        patched: which of these are effects; the others are estimates, which only put heads in order. None: all are.
        first: sign of the side that is looked for first; it gets the heads that could be on either.
    """
    scored = partial(patcher.scored, metric)
    effect = JointEffects(patcher, position, receivers)
    singles, top = scored(alone), top_layer(alone.shape[0], receivers)
    order = {sign: [head for head in strongest(singles, sign) if head[0] < top] for sign in (1, -1)}
    everything = frozenset(order[1])
    effect.known |= {frozenset({head}): alone[head] for head in order[1] if patched is None or patched[head]}
    effect.known[everything] = together
    effect.strength = singles.strength.cpu()
    sure = {sign: _chosen(rule.adds(singles, sign)) & everything for sign in (1, -1)}
    effect.sure = sure[1] | sure[-1]
    sides, tolerance = _sides(effect, scored, rule, everything, sure, first)
    found: dict[int, list[Head]] = {1: [], -1: []}
    searched: dict[int, HeadSet] = {}
    for sign in (*sides, *list(sides)[:1]):  # the first one again if the other one took heads from it
        side = [head for head in order[sign] if head in sides[sign] and head not in found[-sign]]
        if side and searched.get(sign) != frozenset(side):
            searched[sign] = frozenset(side)
            found[sign] = _one_side(effect, scored, rule, tolerance, side, sign)
    left, missing = _complete(effect, scored, rule, tolerance, order, found)
    return Selection({sign: tuple(heads) for sign, heads in found.items()}, tolerance, left, missing)


def _sides(
    effect: "JointEffects", scored: Scored, rule: Rule, everything: HeadSet, sure: dict[int, HeadSet], first: int
) -> tuple[dict[int, HeadSet], float]:
    """The heads among which the senders of each side that counts are looked for, and the tolerance.

    Args:
        everything: A.
        sure: sign -> the heads whose own effect is enough in its direction.
        first: the side that is looked for first.
    """
    whole = {sign: everything - sure[-sign] for sign in (1, -1)}
    sets = [everything, whole[1], whole[-1], sure[1], sure[-1]]
    joint = scored(effect.of_each(sets))
    tolerance = (1 - rule.coverage) * float(joint.strength.abs().max())
    enough = {
        sign: dict(zip(sets, (rule.counts(joint, sign) & (sign * joint.strength > tolerance)).tolist(), strict=True))
        for sign in (1, -1)
    }
    counting = [sign for sign in (first, -first) if enough[sign][whole[sign]] or enough[sign][sure[sign]]]
    if len(counting) == 1 and enough[counting[0]][everything]:
        return {counting[0]: everything}, (1 - rule.coverage) * abs(float(joint.strength[0]))
    return {sign: whole[sign] if enough[sign][whole[sign]] else sure[sign] for sign in counting}, tolerance


def _complete(
    effect: "JointEffects",
    scored: Scored,
    rule: Rule,
    tolerance: float,
    order: dict[int, list[Head]],
    found: dict[int, list[Head]],
) -> tuple[tuple[float, float], ...]:
    """Let join what the sides together leave out.

    Args:
        order: sign -> A, strongest first.
        found: sign -> senders; those that join are added.

    Returns:
        E(A - C) and E(A) - E(C), each with its standard error.
    """
    everything = frozenset(order[1])
    for rounds in range(ROUNDS + 1):
        senders = frozenset(found[1]) | frozenset(found[-1])
        changed = effect.of_each([everything - senders, everything])
        gaps = scored(changed - effect.of_each([frozenset(), senders]))
        outside = (rule.counts(gaps, 1) | rule.counts(gaps, -1)) & (gaps.strength.abs() > tolerance)
        more: list[Head] = []
        for patched, gap in zip((frozenset(), senders), torch.where(outside, gaps.strength, 0.0).tolist(), strict=True):
            if gap and not more and rounds < ROUNDS:
                sign = 1 if gap > 0 else -1
                rest = [head for head in order[sign] if head not in senders]
                more = needed(effect, scored, rule, tolerance, patched, rest, sign) or []
                found[sign] += more
        if not more:
            break
    return tuple(zip(gaps.strength.tolist(), gaps.noise.tolist(), strict=True))


def _one_side(
    effect: "JointEffects",
    scored: Scored,
    rule: Rule,
    tolerated: float,
    side: Sequence[Head],
    sign: int,
) -> list[Head]:
    """Steps 2 to 5 for the heads of one side, strongest first; none where all of them together do too little."""
    everything = frozenset(side)
    whole = scored(effect.of(everything))
    if not rule.counts(whole, sign) or sign * float(whole.strength) <= tolerated:
        return []
    found = needed(effect, scored, rule, tolerated, frozenset(), side, sign)
    if found is None:
        return effect.sure_of(side[: rule.most_senders], sign)
    senders = frozenset(found)
    parts = [part for sender in found for part in (frozenset({sender}), senders - {sender})]
    effect.of_each([*parts, *(everything - (senders - part) for part in parts)])  # in one question, while none joins
    for sender in found:  # which grows
        for patched in ({sender}, set(found) - {sender}):
            gap = scored(effect.of(everything - (set(found) - patched)) - effect.of(patched))
            if rule.counts(gap, sign) and sign * float(gap.strength) > tolerated + BEYOND * float(gap.noise):
                outside = [head for head in side if head not in found]
                found += needed(effect, scored, rule, tolerated, frozenset(patched), outside, sign) or []
    return found


def top_layer(n_layers: int, receivers: Receivers) -> int:
    """The layer below which heads can be senders."""
    return n_layers if receivers.component is None else max(layer for layer, _ in receivers.heads)


def _chosen(mask: Bool[Tensor, "layers h"]) -> HeadSet:
    return frozenset((layer, head) for layer, head in mask.nonzero().tolist())
