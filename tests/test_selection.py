"""Selection of senders: planted circuits, and heads that stand in for each other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.circuits.circuit import Component, Node
from stages.circuits.given_hops import HopSpec, given_hops
from stages.circuits.needed_heads import shortest_run
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.rule import Rule
from stages.circuits.scores import Metric, Scores
from stages.circuits.screening import gate_sets
from stages.circuits.search import Found, search
from stages.circuits.selection import Selection, select_heads
from stages.tasks.old.boxes import Boxes
from tests.planted import PLANS, planted_patcher

RULE = Rule(minimum_effect=0.02, minimum_head_effect=0.005, noise_z=4.0, coverage=0.9, merge_overlap=0.5, max_depth=5)


@pytest.mark.parametrize("screen", [None, 0.5])
@pytest.mark.parametrize("name", PLANS)
def test_search_finds_exactly_the_planted_circuit(name, screen):
    patcher = planted_patcher(PLANS[name])
    assert bool((patcher.clean > 5).all()) and abs(float(patcher.corrupt.mean())) < 1  # the model does its task
    rule = replace(RULE, screen=screen)
    circuit, hops = search(patcher, Metric.LOGIT_DIFFERENCE, rule, lambda hop: None, "last")
    for hop in hops:  # whatever is selected was patched alone, and with a screen not all the rest was
        assert hop.patched is None or all(bool(hop.patched[head]) for part in hop.found for head in part.heads)
    assert (screen is None) == all(hop.patched is None or bool(hop.patched.all()) for hop in hops)
    planted, found = PLANS[name].nodes, set(circuit.nodes)
    precision, recall = len(found & planted) / len(found), len(found & planted) / len(planted)
    print(f"{name}: precision {precision}, recall {recall}")
    assert found == planted
    for sign in (1, -1):
        into_logits = {
            node
            for group in circuit.groups
            if group.receiver == "logits" and group.sign == sign
            for node in group.nodes
        }
        assert into_logits == PLANS[name].writers(sign)
    against = [group.name for group in circuit.groups if group.sign < 0]
    assert all(hop.selection is None or hop.selection.shortfall == 0 for hop in hops)
    assert bool(against) == any(head.weight < 0 for head in PLANS[name].heads), against


def test_what_feeds_a_suppressor_works_against_the_answer():
    patcher = planted_patcher(PLANS["suppressor_above"])
    circuit, hops = search(patcher, Metric.LOGIT_DIFFERENCE, RULE, lambda hop: None, "last")
    groups = {group.name: group for group in circuit.groups}
    assert (groups["answer"].heads, groups["answer"].sign) == (((2, 3),), 1)
    assert (groups["answer-against"].heads, groups["answer-against"].sign) == (((3, 0),), -1)
    fed = groups["v_last>answer-against"]
    assert (fed.receiver, fed.component, fed.heads, fed.sign) == ("answer-against", Component.V, ((2, 3),), -1)
    print(f"mover {groups['answer'].scores}, suppressor {groups['answer-against'].scores}")
    assert groups["answer-against"].scores[0] < -1  # more than all that is left of the answer
    assert all(abs(float(hop.joint.score)) < 1.05 for hop in hops if hop.receiver == "logits")


def test_heads_that_cancel_are_found_where_all_heads_together_do_nothing():
    _, hops = search(
        planted_patcher(PLANS["cancelling_queries"]), Metric.LOGIT_DIFFERENCE, RULE, lambda hop: None, "last"
    )
    hop = next(hop for hop in hops if hop.name == "q_last")
    assert hop.gate is not None and hop.scores is not None
    alone = [float(hop.scores.strength[head]) for head in ((1, 0), (1, 1))]
    print(f"all {float(hop.joint.strength):+.4f}, alone {alone}, gate {hop.gate.strength.tolist()}")
    assert abs(float(hop.joint.strength)) < RULE.minimum_effect / 2 and alone[0] > 0.3
    assert alone[1] < RULE.minimum_head_effect  # seen in company alone
    assert hop.found == (
        Found("q_last", 1, ((1, 0),), "q_last"),
        Found("q_last-against", -1, ((1, 1),), "q_last-against"),
    )


@pytest.mark.parametrize(("name", "hop_name"), [("stand_in_for_q", "q_last"), ("stand_in_for_k", "k_separator")])
def test_planted_stand_ins_show_nothing_alone_and_everything_together(name, hop_name):
    _, hops = search(
        planted_patcher(PLANS[name]), Metric.LOGIT_DIFFERENCE, RULE, lambda hop: None, "last", display=Boxes.display
    )
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
        specs = [HopSpec(*hop) for hop in Boxes.paper_hops]
        circuit, hops = given_hops(patcher, metric, RULE, specs, None, None, lambda hop: None)
        assert [(g.name, g.position, g.receiver, g.component, g.heads) for g in circuit.groups] == [
            ("value_fetcher", "last", "logits", None, ((3, 1),)),
            ("pos_transmitter", "last", "value_fetcher", Component.Q, ((2, 3),)),
            ("pos_detector", "query_label", "pos_transmitter", Component.V, ((1, 0),)),
            ("struct_reader", "earlier_label", "pos_detector", Component.V, ((0, 2),)),
        ]
        top, _ = given_hops(patcher, metric, RULE, specs, [1, 1, 1, 1], [1, 1, 1, 1], lambda hop: None)
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

    def __init__(self, broken: Callable[[Sequence[bool]], float], n_heads: int = 12, n: int = 30) -> None:
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


def selection_of(patcher: "Imagined | Signed", rule: Rule = RULE) -> Selection:
    """By the parts' own numbers."""
    n = patcher.walker.n_heads
    together = patcher.effects("last", torch.ones(1, 1, n, dtype=torch.bool), [Receivers()])[0][0]
    alone = patcher.effects("last", torch.eye(n, dtype=torch.bool)[:, None], [Receivers()])[0][None]
    patcher.rows = 0
    args = (Metric.LOGIT_DIFFERENCE, rule, "last", Receivers(), together, alone)
    found = select_heads(patcher, *args)
    senders = {sign: tuple((0, patcher.place.index(head)) for _, head in of) for sign, of in found.senders.items()}
    return replace(found, senders=senders)


def selected(patcher: Imagined) -> set[int]:
    found = selection_of(patcher)
    assert found.senders[-1] == () and found.shortfall == 0
    return {part for _, part in found.senders[1]}


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
    found = selection_of(Imagined(lambda x: False))
    assert found.senders == {1: (), -1: ()}
    for value, noise in (found.left, found.missing):  # the tolerance is a share of nothing, so what is left is noise
        assert abs(value) <= RULE.noise_z * noise


# What a model of parts does where some are corrupt: what is lost of its answer, below 0 where it gets better.
SIGNED = {
    "a mover and a weaker one against it": (lambda x: 1.6 * x[0] - 0.6 * x[1], {0}, {1}),
    "two that cancel exactly, beside a mover": (lambda x: x[0] + 0.5 * x[1] - 0.5 * x[2], {0, 1}, {2}),
    "two that cancel exactly, alone": (lambda x: 0.5 * x[1] - 0.5 * x[2], {1}, {2}),
    "only against": (lambda x: -0.4 * x[0] - 0.3 * x[1], set(), {0, 1}),
    "movers that stand in, one against": (lambda x: (x[0] & x[1]) - 0.4 * x[2], {0, 1}, {2}),
    "against it, either of two is enough": (lambda x: 1.4 * x[0] - 0.4 * (x[1] & x[2]), {0}, {1, 2}),
    "both sides stand in": (lambda x: 1.4 * (x[0] & x[3]) - 0.4 * (x[1] & x[2]), {0, 3}, {1, 2}),
    "against it in company alone": (lambda x: x[0] & (not x[1]), {0}, {1}),
    "many weak ones against": (lambda x: 1.4 * x[0] - 0.05 * sum(x[1:9]), {0}, None),
}


class Signed(Imagined):
    """Loses as much as the corrupt parts say."""

    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        self.rows += len(senders)
        whole = torch.tensor([float(self.broken([row[at] for at in self.place])) for row in senders[:, 0].tolist()])
        return [-whole[:, None] + 0.1 * (senders[:, 0].float() @ self.little) for _ in receivers]


@pytest.mark.parametrize("name", SIGNED)
def test_heads_for_and_against_the_answer_are_found_with_their_signs(name):
    broken, towards, against = SIGNED[name]
    patcher = Signed(broken)
    found = selection_of(patcher)
    signs = {sign: {part for _, part in of} for sign, of in found.senders.items()}
    print(f"{name}: {signs} with {patcher.rows} joint patches, {found}")
    assert signs[1] == towards
    assert signs[-1] == against if against is not None else signs[-1] and signs[-1] <= set(range(1, 9))
    assert found.shortfall == 0 and max(abs(found.left[0]), abs(found.missing[0])) <= found.tolerance
    chosen = [at in signs[1] | signs[-1] for at in range(12)]  # the slow way: what the senders leave out, in both tests
    left, missing = broken([not at for at in chosen]), broken([True] * 12) - broken(chosen)
    assert abs(left) <= found.tolerance + 0.01 and abs(missing) <= found.tolerance + 0.01


def test_a_spread_effect_has_the_senders_that_do_enough_alone():
    """Every head does as much as any other one: no few of them are the mechanism."""
    patcher = Imagined(lambda broken: sum(broken) / len(broken))
    whole = selection_of(patcher)
    few, cost = selection_of(patcher, replace(RULE, most_senders=4)), patcher.rows
    print(whole, few, cost)
    assert len(whole.senders[1]) >= 11 and whole.shortfall == 0
    assert len(few.senders[1]) == 4 and few.shortfall > 0.5 and cost < 20
    assert selection_of(patcher, replace(RULE, most_senders=11)) == whole, "a most that is not needed changes nothing"


def test_what_cannot_be_found_is_a_shortfall():
    """Three hundred heads that each do less than the smallest effect of a head."""
    found = selection_of(Signed(lambda x: 0.001 * sum(x), n_heads=300))
    print(found.shortfall, found.left, found.tolerance)
    assert found.senders == {1: (), -1: ()} and found.tolerance == pytest.approx(0.03, abs=1e-3)
    assert found.shortfall == pytest.approx(0.27, abs=2e-3) == found.left[0] - found.tolerance


@pytest.mark.parametrize(("n_layers", "n_heads"), [(1, 1), (1, 2), (2, 3), (6, 8), (30, 9)])
def test_gate_sets_part_any_two_heads_in_both_directions(n_layers, n_heads):
    sets = gate_sets(n_layers, n_heads, Receivers())
    print(f"{n_layers} x {n_heads} heads: {len(sets)} sets")
    assert bool(sets[0].all()) and len(sets) <= 3 + 1.3 * math.log2(n_layers * n_heads)
    member = sets.flatten(1).T.int()  # heads by sets
    apart = (member[:, None] > member[None]).any(-1)
    assert bool((apart | torch.eye(len(member), dtype=torch.bool)).all())
    # below the highest receiver alone
    if n_layers > 1:
        lower = gate_sets(n_layers, n_heads, Receivers(Component.V, ((1, 0), (0, 0))))
        assert not bool(lower[:, 1:].any()) and bool(lower[0, 0].all())


@pytest.mark.parametrize("seed", range(5))
def test_the_gate_sees_two_heads_that_cancel_whichever_they_are(seed):
    """Also where one of them does nothing alone."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(270, generator=generator)[:2].tolist()
    sets = gate_sets(30, 9, Receivers()).flatten(1)
    for other in (-0.1, 0.0):  # what the second one does alone; both together do nothing
        one, two = sets[:, first].double(), sets[:, second].double()
        effect = 0.1 * one * (1 - two) + other * two * (1 - one)
        strength = effect + 1e-4 * torch.randn(len(sets), generator=generator, dtype=torch.float64)
        scores = Scores.of(Metric.LOGIT_DIFFERENCE, strength, torch.full_like(strength, 1e-4))
        assert abs(float(scores.strength[0])) < 1e-3 and RULE.counts_either(scores)
    nothing = Scores.of(Metric.LOGIT_DIFFERENCE, 0 * strength, torch.full_like(strength, 1e-4))
    assert not RULE.counts_either(nothing)
    noisy = Scores.of(Metric.LOGIT_DIFFERENCE, strength, torch.full_like(strength, 1.0))
    assert not RULE.counts_either(noisy)


def test_plans_have_the_nodes_that_they_say():
    assert PLANS["induction"].nodes == {Node(0, 1, "earlier_object"), Node(1, 2, "last")}


def test_the_shortest_run_is_found_from_any_guess_in_few_steps():
    for longest in range(1, 40):
        for answer in range(1, longest + 1):
            for guess in range(0, longest + 2):
                tried: list[int] = []

                def passes(run: int, answer: int = answer, tried: list[int] = tried) -> bool:
                    tried.append(run)
                    return run >= answer

                assert shortest_run(longest, guess, passes) == answer
                assert len(tried) == len(set(tried)) and all(1 <= run < longest for run in tried)
                assert len(tried) <= 3 + 2 * math.log2(1 + abs(answer - max(1, guess)))
