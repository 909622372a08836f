"""Which heads of a circuit its model does without: they were found, and are no part of it.

A head can carry much of what reaches its receivers, and the circuit still do as well without it, because others take
its place or because what it carries does not decide the answer. Kept in the circuit of a base, such a head speaks for
nothing there; in a tuned model it may do anything, which then looks like damage to the circuit. So it is left out, by a
rule that sees the base alone:

1. The circuit as it was found has the score F in place, everything else mean-ablated.
2. The group without which it has most left goes, heads that it shares with others included, as long as the circuit
   still has (1 - tolerance) F; again, until no group can go.
3. Heads go likewise, one by one, in the order of what the circuit has left without each of them alone, once each.

What is left has at least (1 - tolerance) F as a whole, whatever went: the tolerance is of everything together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stages.circuits.circuit import Circuit, Group, Node

# F of circuits, run as variants of one pass
ScoreOf = Callable[[Sequence[frozenset[Node]]], Sequence[float]]


@dataclass(frozen=True)
class Left:
    """What was found out.

    Attributes:
        circuit: without its idle heads, which it names.
        before: F of the circuit as it was found.
        after: F of the circuit.
        groups: name -> F without that group alone.
        heads: node -> F without that head alone, of the groups that stay.
    """

    circuit: Circuit
    before: float
    after: float
    groups: dict[str, float]
    heads: dict[Node, float]


def without_idle(score_of: ScoreOf, circuit: Circuit, tolerance: float) -> Left:
    """Leave out what a circuit does without; nothing where it has no positive score.

    Args:
        score_of: F of many circuits.
        circuit: as it was found.
        tolerance: share of F that may be lost in all.
    """
    kept = frozenset(circuit.nodes)
    (before,) = score_of([kept])
    least, after = (1 - tolerance) * before, before
    live = list(circuit.groups)
    groups: dict[str, float] = {}
    while before > 0 and live:
        without = score_of([kept - set(group.nodes) for group in live])
        groups = groups or {group.name: value for group, value in zip(live, without, strict=True)}
        best = max(range(len(live)), key=lambda place: without[place])
        if without[best] < least:
            break
        kept, after = kept - set(live[best].nodes), without[best]
        live = [group for group in live if group.only(kept).heads]
    nodes = sorted(kept)
    alone = score_of([kept - {node} for node in nodes]) if before > 0 and nodes else []
    heads = dict(zip(nodes, alone, strict=False))
    for node in sorted(heads, key=lambda node: (-heads[node], node)):
        if heads[node] < least:
            break  # neither this one can go nor those that cost more
        (value,) = score_of([kept - {node}])
        if value >= least:
            kept, after = kept - {node}, value
    return Left(_parted(circuit, kept), before, after, groups, heads)


def _parted(circuit: Circuit, kept: frozenset[Node]) -> Circuit:
    """The circuit of some of its nodes, the others being idle."""
    gone = frozenset(circuit.nodes) - kept

    def of(nodes: frozenset[Node]) -> tuple[Group, ...]:
        return tuple(part for part in (group.only(nodes) for group in circuit.groups) if part.heads)

    return replace(circuit, groups=of(kept), idle=of(gone))
