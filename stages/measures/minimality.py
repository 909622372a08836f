"""Minimality: does every head of a circuit earn its place, and which heads can go?

A head v of a set G of heads earns its place in the circuit C if there is a set K of other heads of G without which v
is missed (Wang et al., ICLR 2023, section 4.2; Prakash et al., ICLR 2024, section 4.3). Its score is

    F(C \\ K) / F(C \\ (K and v)) - 1,

and v is kept where that is at least a threshold (the paper's is 0.01). All K are too many, so they are searched:

*By pairs*, as the paper does:
1. F without every pair of heads of the group. 2. The heads u are ranked by how much v still matters once u is gone,
and K is the first `share` of them, up to the first one after which v does not matter. 3. One score for each v.
Two defects of the published code are mended: a pair is told from a head alone by both layer and head (there, pairs
with equal head numbers were never removed together), and F is not rounded (there, to two decimals, so that with 100
prompts the rule asked for one prompt). Its other weakness is the rule's own: each head is judged with all others of
the circuit in place, so of three alike heads, of which any one suffices, no pair shows that a third is missed, and
all three are dropped together.

*By elimination*, with fewer circuits to run, and safe to prune by:
1. Every head alone: one that is missed is kept.
2. The others, the least missed first, are taken out one after another for good, unless what is already gone makes the
   next one missed. What is left, the *core*, is a circuit that was run as a whole.
3. Every head of the core is tested once more in the core. Every head that went is put back in the place of each head
   of the core that it may stand in for; where it is missed there, it is a *stand-in*, which the paper's definition
   keeps and a smallest circuit does not need.
Each verdict is certified by an explicit K. A score by any search is at most the best over all K, so a missed head is
certain, and an idle one only as far as the search went.

F is any score of which a larger one is better. A head that works against the answer is never missed: without it F
rises. Each head that goes may cost a little less than the threshold, so state what the core has of the whole.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

from stages.circuits.circuit import Node

# F of circuits, run as variants of one pass
ScoreOf = Callable[[Sequence[frozenset[Node]]], Sequence[float]]


@dataclass(frozen=True)
class Trial:
    """One head's test.

    Attributes:
        removed: K, the heads that were gone before.
        before: F(C \\ K).
        after: F(C \\ (K and v)).
    """

    removed: frozenset[Node]
    before: float
    after: float

    @property
    def score(self) -> float:
        """The relative loss, infinite where nothing is left; 0 where there was nothing to lose."""
        return relative_loss(self.before, self.after)


@dataclass(frozen=True)
class Pruning:
    """What elimination found.

    Attributes:
        core: heads that stay; with them alone the circuit lost less than the threshold at every step.
        stand_ins: heads that went but are missed where they could replace one that stayed.
        idle: heads that went and were never missed.
        trials: for each head the test with the highest score.
        before: F of the whole circuit.
        after: F of the circuit with the core alone.
    """

    core: frozenset[Node]
    stand_ins: frozenset[Node]
    idle: frozenset[Node]
    trials: Mapping[Node, Trial]
    before: float
    after: float


def relative_loss(before: float, after: float) -> float:
    """before / after - 1; infinite where nothing of something is left, 0 where there was nothing to lose."""
    if before <= 0:
        return 0.0
    return before / after - 1 if after > 0 else inf


def by_pairs(
    score_of: ScoreOf, circuit: Collection[Node], group: Collection[Node], share: float = 0.3
) -> dict[Node, Trial]:
    """The paper's search: one trial for each head of the group, after n (n + 1) / 2 + 2 n circuits.

    Args:
        score_of: F of many circuits.
        circuit: C.
        group: heads that are tested, and that K is drawn from.
        share: of the group, rounded up, the most heads that K may have.
    """
    whole, heads = frozenset(circuit), sorted(set(group))
    pairs = [(u, v) for index, u in enumerate(heads) for v in heads[index:]]
    values = score_of([whole - {u, v} for u, v in pairs])
    without = {frozenset(pair): value for pair, value in zip(pairs, values, strict=True)}
    most = ceil(share * len(heads))
    chosen = []
    for v in heads:
        matters = {u: without[frozenset({u})] - without[frozenset({u, v})] for u in heads if u != v}
        ranked = sorted(matters, key=lambda u: (-matters[u], u))
        chosen.append(frozenset(u for u in ranked[:most] if matters[u] > 0))
    tested = [circuit for v, gone in zip(heads, chosen, strict=True) for circuit in (whole - gone, whole - gone - {v})]
    values = score_of(tested)
    return {
        v: Trial(gone, before, after)
        for v, gone, before, after in zip(heads, chosen, values[::2], values[1::2], strict=True)
    }


def by_elimination(score_of: ScoreOf, circuit: Collection[Node], group: Collection[Node], threshold: float) -> Pruning:
    """The safe search; of n heads of which d go it runs about 2 n + d (n - d) circuits.

    Args:
        score_of: F of many circuits.
        circuit: C.
        group: heads that are tested; the whole circuit, or a part of it.
        threshold: least score with which a head counts as missed.
    """
    whole, heads = frozenset(circuit), sorted(set(group))
    before, *alone = score_of([whole, *(whole - {v} for v in heads)])
    trials = {v: Trial(frozenset(), before, after) for v, after in zip(heads, alone, strict=True)}

    gone: frozenset[Node] = frozenset()
    value = before
    for v in sorted(heads, key=lambda v: (-trials[v].after, v)):  # the least missed first
        if trials[v].score >= threshold:
            continue
        trial = trials[v] if not gone else Trial(gone, value, score_of([whole - gone - {v}])[0])
        if trial.score >= threshold:
            trials[v] = trial
        else:
            gone, value = gone | {v}, trial.after

    core = frozenset(heads) - gone
    left = whole - gone
    kept = sorted(core)
    without = dict(zip(kept, score_of([left - {w} for w in kept]), strict=True)) if kept else {}
    for w in kept:
        trials[w] = max(trials[w], Trial(gone, value, without[w]), key=lambda trial: trial.score)

    swaps = [(v, w) for v in sorted(gone) for w in kept]
    values = score_of([left - {w} | {v} for v, w in swaps]) if swaps else []
    for (v, w), swapped in zip(swaps, values, strict=True):
        trial = Trial(gone - {v} | {w}, swapped, without[w])
        trials[v] = max(trials[v], trial, key=lambda trial: trial.score)
    stand_ins = frozenset(v for v in gone if trials[v].score >= threshold)
    return Pruning(core, stand_ins, gone - stand_ins, trials, before, value)
