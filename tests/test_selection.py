"""Selection of senders: planted circuits, and heads that stand in for each other."""

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.circuits.circuit import Component, Node
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.scores import Metric
from stages.circuits.search import paper_hops, search
from stages.circuits.selection import Rule, select_heads
from tests.planted import PLANS, planted_patcher

RULE = Rule(minimum_effect=0.02, minimum_head_effect=0.005, noise_z=4.0, coverage=0.9, merge_overlap=0.5, max_depth=5)


@pytest.mark.parametrize("name", PLANS)
def test_search_finds_exactly_the_planted_circuit(name):
    patcher = planted_patcher(PLANS[name])
    assert bool((patcher.clean > 5).all()) and abs(float(patcher.corrupt.mean())) < 1  # the model does its task
    circuit, _ = search(patcher, Metric.LOGIT_DIFFERENCE, RULE, lambda hop: None)
    planted, found = PLANS[name].nodes, set(circuit.nodes)
    precision, recall = len(found & planted) / len(found), len(found & planted) / len(planted)
    print(f"{name}: precision {precision}, recall {recall}")
    assert found == planted


@pytest.mark.parametrize(("name", "hop_name"), [("stand_in_for_q", "q_last"), ("stand_in_for_k", "k_separator")])
def test_planted_stand_ins_show_nothing_alone_and_everything_together(name, hop_name):
    _, hops = search(planted_patcher(PLANS[name]), Metric.LOGIT_DIFFERENCE, RULE, lambda hop: None)
    hop = next(hop for hop in hops if hop.name == hop_name)
    assert hop.scores is not None and len(hop.heads) == 2
    alone = [abs(float(hop.scores.strength[head])) for head in hop.heads]
    print(f"{hop_name}: together {float(hop.joint.strength):.3f}, alone {alone}")
    assert float(hop.joint.strength) > 0.9 and max(alone) < RULE.minimum_head_effect / 10
    single = [head for head in hop.strongest(100) if float(hop.scores.strength[head]) >= RULE.minimum_head_effect]
    assert not set(single) & set(hop.heads)  # single scores miss both


def test_paper_hops_find_the_planted_chain():
    for metric in Metric:
        patcher = planted_patcher(PLANS["paper"], metric)
        circuit, hops = paper_hops(patcher, metric, RULE, None, None, lambda hop: None)
        assert [(g.name, g.position, g.receiver, g.component, g.heads) for g in circuit.groups] == [
            ("value_fetcher", "last", "logits", None, ((3, 1),)),
            ("pos_transmitter", "last", "value_fetcher", Component.Q, ((2, 3),)),
            ("pos_detector", "query_label", "pos_transmitter", Component.V, ((1, 0),)),
            ("struct_reader", "earlier_label", "pos_detector", Component.V, ((0, 2),)),
        ]
        top, _ = paper_hops(patcher, metric, RULE, [1, 1, 1, 1], [1, 1, 1, 1], lambda hop: None)
        assert top.groups == circuit.groups
        assert all(float(hop.joint.strength) > 0.5 for hop in hops)


# What breaks an imagined model, by which of its parts are corrupt. Each part is one head of one layer.
CIRCUITS = {
    "one": (lambda x: x[0], {0}),
    "either": (lambda x: x[0] & x[1], {0, 1}),
    "both": (lambda x: x[0] | x[1], {0, 1}),
    "any of four": (lambda x: x[0] & x[1] & x[2] & x[3], {0, 1, 2, 3}),
    "three of five": (lambda x: sum(x[:5]) >= 3, {0, 1, 2, 3, 4}),
    "one, and either of two": (lambda x: x[0] | (x[1] & x[2]), {0, 1, 2}),
    "one, or both of two": (lambda x: x[0] & (x[1] | x[2]), {0, 1, 2}),
    "two pairs of stand-ins": (lambda x: (x[0] & x[1]) | (x[2] & x[3]), {0, 1, 2, 3}),
    "either of two pairs": (lambda x: (x[0] | x[1]) & (x[2] | x[3]), {0, 1, 2, 3}),
}


class Imagined(PathPatcher):
    """Corrupt heads break each example by 1 or 0; other heads do a little, more or less.

    Attributes:
        place: which head each part is, so that the order of heads tells nothing.
        rows: how many sets of heads were patched.
    """

    def __init__(self, broken: Callable[[Sequence[bool]], bool], n_heads: int = 12, n: int = 30) -> None:
        generator = torch.Generator().manual_seed(0)
        self.broken = broken
        self.little = 0.005 / n_heads**0.5 * torch.randn(n_heads, n, generator=generator)
        self.place: list[int] = torch.randperm(n_heads, generator=generator).tolist()
        self.rows = 0
        self.clean, self.corrupt = torch.ones(n), torch.zeros(n)
        shape: Any = SimpleNamespace(n_layers=1, n_heads=n_heads)
        self.walker = shape

    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        self.rows += len(senders)
        whole = torch.tensor([float(self.broken([row[at] for at in self.place])) for row in senders[:, 0].tolist()])
        return [-whole[:, None] + senders[:, 0].float() @ self.little for _ in receivers]


def selected(patcher: Imagined) -> set[int]:
    n = patcher.walker.n_heads
    together = patcher.effects("last", torch.ones(1, 1, n, dtype=torch.bool), [Receivers()])[0][0]
    alone = patcher.effects("last", torch.eye(n, dtype=torch.bool)[:, None], [Receivers()])[0][None]
    patcher.rows = 0
    args = (Metric.LOGIT_DIFFERENCE, RULE, "last", Receivers(), together, alone)
    return {patcher.place.index(head) for _, head in select_heads(patcher, *args)}


@pytest.mark.parametrize("name", CIRCUITS)
def test_every_head_that_can_matter_is_found(name):
    broken, heads = CIRCUITS[name]
    subsets = chain.from_iterable(combinations(range(12), size) for size in range(5))
    matters = {
        head
        for rest in subsets
        for head in range(12)
        if broken([at in rest or at == head for at in range(12)]) != broken([at in rest for at in range(12)])
    }
    assert matters == heads  # the slow way: a head matters if it changes the outcome beside some other heads
    patcher = Imagined(broken)
    found = selected(patcher)
    print(f"{name}: found {sorted(found)} with {patcher.rows} joint patches")
    assert found == heads


def test_cost_stays_modest():
    broken = CIRCUITS["both"][0]
    patcher = Imagined(broken, n_heads=300)
    assert selected(patcher) == {0, 1}
    print(f"{patcher.rows} joint patches next to 300 single ones")
    assert patcher.rows < 60
    patcher = Imagined(CIRCUITS["any of four"][0], n_heads=300)
    assert selected(patcher) == {0, 1, 2, 3}
    print(f"{patcher.rows} where single patches tell nothing")
    assert patcher.rows < 900


def test_nothing_is_selected_where_all_heads_together_do_nothing():
    assert selected(Imagined(lambda x: False)) == set()


def test_plans_have_the_nodes_that_they_say():
    assert PLANS["induction"].nodes == {Node(0, 1, "earlier_object"), Node(1, 2, "last")}
