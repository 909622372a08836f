"""Completeness: does the circuit lose what the model loses?

With a set of heads K taken out of both, a complete circuit C behaves as the model M does: the gap
|F(C \\ K) - F(M \\ K)| is small for every K (Wang et al., ICLR 2023, section 4.1; Prakash et al., ICLR 2024,
section 4.2). C \\ K is the circuit in place, all else mean-ablated; M \\ K is the model with only K mean-ablated.
Random sets of half of the heads leave both at the floor, which says nothing, so smaller sets and whole groups are
taken as well, and a greedy search looks for the worst set of a few heads.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from stages.circuits.circuit import Node
from stages.measures.prepared import Prepared
from stages.measures.scores import ENDINGS, ratio, shares

GapOf = Callable[[Sequence[frozenset[Node]]], Sequence[float]]  # the gaps of sets K


def random_subsets(nodes: Collection[Node], n: int, generator: np.random.Generator) -> list[frozenset[Node]]:
    """n sets of heads; each has its own share of the heads, drawn evenly up to one half, and at least one head."""
    everything = sorted(set(nodes))
    sets = []
    for _ in range(n):
        size = max(1, round(generator.uniform(0, 0.5) * len(everything)))
        sets.append(frozenset(everything[index] for index in generator.choice(len(everything), size, replace=False)))
    return sets


def greedy_worst(gap_of: GapOf, nodes: Collection[Node], steps: int) -> frozenset[Node]:
    """The set of at most `steps` heads that grows by the head with the largest gap, while the gap grows."""
    found: frozenset[Node] = frozenset()
    largest = 0.0
    for _ in range(steps):
        candidates = sorted(set(nodes) - found)
        gaps = gap_of([found | {node} for node in candidates]) if candidates else []
        best = max(range(len(candidates)), key=lambda index: gaps[index], default=None)
        if best is None or gaps[best] <= largest:
            break
        found, largest = found | {candidates[best]}, gaps[best]
    return found


def completeness(
    model: Prepared, circuit: Collection[Node], removed: Mapping[str, Collection[Node]]
) -> dict[str, dict[str, float | int | None]]:
    """F of circuit and model, whole (entry "nothing", with the faithfulness) and without each set K.

    Returns:
        name of K -> size, the four scores of circuit and model, and the gap in each, in logit difference as a share of
        the whole model's; for "nothing" also the faithfulness by each.
    """
    whole, sets = frozenset(circuit), [frozenset(), *(frozenset(nodes) for nodes in removed.values())]
    of_circuit, of_model = model.in_place([whole - nodes for nodes in sets]).means(), model.without(sets).means()
    full = of_model[0]
    record: dict[str, dict[str, float | int | None]] = {}
    for name, nodes, kept, left in zip(["nothing", *removed], sets, of_circuit, of_model, strict=True):
        gaps = {score: abs(kept[score] - left[score]) for score in ENDINGS}
        record[name] = {
            "size": len(nodes),
            **{f"circuit_{score}": kept[score] for score in ENDINGS},
            **{f"model_{score}": left[score] for score in ENDINGS},
            **{f"gap{ending}": gaps[score] for score, ending in ENDINGS.items()},
            "gap_ld": ratio(gaps["logit_difference"], full["logit_difference"]),
        }
    record["nothing"] |= shares("faithfulness", of_circuit[0], full)
    return record
