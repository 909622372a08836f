"""Does a hop count, and what does each head do alone? The first questions of a hop, answered by patching every head, or
only those that are estimated to do something (`estimates`)."""

from collections.abc import Iterator, Sequence
from itertools import combinations, count
from math import comb

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.circuits.needed_heads import Head
from stages.circuits.patcher import Patcher, head_sets
from stages.circuits.rule import Rule
from stages.circuits.scores import Metric
from stages.circuits.selection import top_layer
from stages.circuits.sweep import Receivers

# effects of the gate's sets; those of each head alone, and which of these are effects and not estimates; None and none
# where the hop does not count
Asked = tuple[Float[Tensor, "sets n"], Float[Tensor, "layers h n"] | None, Bool[Tensor, "layers h"]]


def heads_alone(
    patcher: Patcher, metric: Metric, rule: Rule, position: str, receivers: Sequence[Receivers]
) -> Iterator[Asked]:
    """The answers for each of the receivers, which have the same heads."""
    asked = _in_full if rule.screen is None else _screened
    return asked(patcher, metric, rule, position, receivers)


def gate_sets(n_layers: int, n_heads: int, receivers: Receivers) -> Bool[Tensor, "e layers h"]:
    """All heads below the highest receiver, and sets of them of which any two heads are apart in both directions.

    The sets are as few as can be: no code word may hold the bits of another one, and the most words of m bits for which
    this is so are those with m // 2 bits (Sperner 1928).
    """
    below = [(layer, head) for layer in range(top_layer(n_layers, receivers)) for head in range(n_heads)]
    bits = next(m for m in count(1) if comb(m, m // 2) >= len(below))
    sets = torch.zeros(1 + bits, n_layers, n_heads, dtype=torch.bool, device="cpu")
    for head, word in zip(below, combinations(range(1, 1 + bits), bits // 2), strict=False):
        for bit in (0, *word):
            sets[bit][head] = True
    return sets


def patch_alone(
    patcher: Patcher,
    position: str,
    receiver: Receivers,
    heads: Sequence[Head],
    alone: Float[Tensor, "layers h n"],
    patched: Bool[Tensor, "layers h"],
) -> None:
    """Put effects in the place of the estimates of some heads, and note so."""
    sets = head_sets([[head] for head in heads], *patched.shape)
    for head, effects in zip(heads, patcher.effects(position, sets, [receiver])[0], strict=True):
        alone[head], patched[head] = effects, True


def _in_full(
    patcher: Patcher, metric: Metric, rule: Rule, position: str, receivers: Sequence[Receivers]
) -> Iterator[Asked]:
    """Without estimates."""
    shape = (patcher.walker.n_layers, patcher.walker.n_heads)
    gates = patcher.effects(position, gate_sets(*shape, receivers[0]), receivers)
    counting = [n for n, gate in enumerate(gates) if rule.counts_either(patcher.scored(metric, gate))]
    effects = dict(zip(counting, patcher.head_effects(position, [receivers[n] for n in counting]), strict=True))
    for number, gate in enumerate(gates):
        yield gate, effects.get(number), torch.full(shape, number in effects, device="cpu")


def _screened(
    patcher: Patcher, metric: Metric, rule: Rule, position: str, receivers: Sequence[Receivers]
) -> Iterator[Asked]:
    """With estimates that say which sets and heads are patched."""
    assert rule.screen is not None
    below = gate_sets(patcher.walker.n_layers, patcher.walker.n_heads, receivers[0])[0]
    for receiver, alone in zip(receivers, patcher.estimates(position, receivers), strict=True):
        strength = patcher.scored(metric, alone).strength
        patched = strength.abs() >= rule.screen * rule.minimum_head_effect
        sets = [below, strength > 0, strength < 0]
        if float(strength.abs().sum()) < rule.screen * rule.minimum_effect:
            sets = sets[:1]
        gate = patcher.effects(position, torch.stack(sets), [receiver])[0]
        if rule.counts_either(patcher.scored(metric, gate)):
            patch_alone(
                patcher,
                position,
                receiver,
                [(layer, head) for layer, head in patched.nonzero().tolist()],
                alone,
                patched,
            )
            yield gate, alone, patched
        else:
            yield gate, None, torch.zeros_like(patched)
