"""What a circuit does without: planted scores, every order by brute force, and a model with dead heads."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Circuit, Component, Group, Node
from stages.measures.idle import Left, ScoreOf, without_idle
from stages.measures.prepared import Prepared
from stages.tasks.examples import Examples
from tests.oracles import random_model, walker_of
from tests.oracles_ablation import random_positions, random_prompts

A, B, C, D, E = (Node(0, head, "last") for head in range(5))


def group(name: str, *nodes: Node) -> Group:
    heads = tuple((node.layer, node.head) for node in nodes)
    return Group(name, "last", "logits", None, heads, tuple(float(-i) for i in range(len(nodes))))


def circuit(*groups: Group) -> Circuit:
    return Circuit(groups, 1, 5)


def adds(**worth: float) -> ScoreOf:
    """Every head adds so much."""
    values = {Node(0, "ABCDE".index(name), "last"): value for name, value in worth.items()}
    return lambda circuits: [float(sum(values[node] for node in nodes)) for nodes in circuits]


def names(left: Left) -> dict[str, list[int]]:
    return {of.name: [head for _, head in of.heads] for of in left.circuit.groups}


def test_idle_groups_go_first_and_then_idle_heads() -> None:
    found = circuit(group("movers", A, B), group("queries", C, D), group("detectors", E))
    left = without_idle(adds(A=0.9, B=0.005, C=0.003, D=0.002, E=0.09), found, 0.02)
    assert names(left) == {"movers": [0], "detectors": [4]}
    assert [(of.name, of.heads, of.scores) for of in left.circuit.idle] == [
        ("movers", ((0, 1),), (-1.0,)), ("queries", ((0, 2), (0, 3)), (0.0, -1.0))
    ]  # fmt: skip
    assert (left.before, left.after) == pytest.approx((1.0, 0.99))
    assert left.groups == pytest.approx({"movers": 0.095, "queries": 0.995, "detectors": 0.91})
    assert set(left.heads) == {A, B, E}
    again = Circuit.from_json(left.circuit.to_json())
    assert again == left.circuit


def test_the_tolerance_is_of_all_that_goes_together() -> None:
    """Three heads of 1 % each: two may go, with 2 %, whichever cost least first."""
    found = circuit(group("movers", A, B, C, D))
    left = without_idle(adds(A=0.97, B=0.0101, C=0.01, D=0.0099), found, 0.02)
    assert names(left) == {"movers": [0, 1]}
    assert left.after >= 0.98 * left.before


def test_what_works_against_the_answer_goes_and_what_stands_in_stays() -> None:
    def score(circuits: Sequence[frozenset[Node]]) -> list[float]:
        return [1.0 * (A in nodes or B in nodes) - 0.2 * (C in nodes) for nodes in circuits]

    left = without_idle(score, circuit(group("movers", A, B), group("against", C)), 0.02)
    assert names(left) == {"movers": [1]}  # of two alike heads the later one stays: they are asked in order
    assert left.after == 1.0 and left.before == 0.8


def test_a_head_of_an_idle_group_is_idle_everywhere() -> None:
    left = without_idle(adds(A=1.0, B=0.0, C=0.5), circuit(group("movers", A, C, B), group("copies", B)), 0.0)
    assert names(left) == {"movers": [0, 2]}
    assert {of.name for of in left.circuit.idle} == {"movers", "copies"}


@pytest.mark.parametrize("score", [0.0, -1.0])
def test_nothing_goes_where_nothing_is_done(score: float) -> None:
    found = circuit(group("movers", A, B))
    left = without_idle(lambda circuits: [score for _ in circuits], found, 0.02)
    assert left.circuit == found and left.heads == {}


def test_never_below_the_tolerance_whatever_the_score() -> None:
    """Random set functions: what is left has its share as a whole, and every head of it is needed alone or was once."""
    found = circuit(group("movers", A, B), group("queries", B, C), group("detectors", D, E))
    for seed in range(200):
        draw = np.random.default_rng(seed)
        sets = {
            frozenset(n for n, x in zip((A, B, C, D, E), bits, strict=True) if x): draw.random()
            for bits in product((0, 1), repeat=5)
        }
        left = without_idle(lambda circuits, sets=sets: [sets[frozenset(nodes)] for nodes in circuits], found, 0.1)
        kept = frozenset(left.circuit.nodes)
        assert sets[kept] == left.after >= 0.9 * left.before - 1e-12
        idle = {node for of in left.circuit.idle for node in of.nodes}
        assert kept | idle == set(found.nodes) and not kept & idle


def test_heads_that_write_nothing_are_idle_in_a_model() -> None:
    """The first head of every layer writes zeros, so its mean is what it gives: the circuit does without it."""
    model = random_model("llama")
    walker, ids, at = walker_of(model), random_prompts(), random_positions()
    size = walker.head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :size] = 0.0
    walker = walker_of(model)
    examples = Examples(
        input_ids=ids, answer=walker.run(ids).logits.argmax(-1), others=ids[:, [1, 2]], positions=at, every_clause={},
        corrupt_ids=ids, corrupt_positions=at,
    )  # fmt: skip
    heads = tuple((layer, head) for layer in range(walker.n_layers) for head in range(walker.n_heads))
    groups = (Group("all", "last", "logits", None, heads), Group("dead", "last", "all", Component.Q, ((0, 0), (1, 0))))
    prepared = Prepared(walker, mean_outputs(walker, ids, 64.0), examples, 64.0)
    left = without_idle(
        lambda circuits: [entry["p_correct"] for entry in prepared.in_place(circuits).means()],
        Circuit(groups, walker.n_layers, walker.n_heads), 1e-9,
    )  # fmt: skip
    idle = {(node.layer, node.head) for of in left.circuit.idle for node in of.nodes}
    assert {(layer, 0) for layer in range(walker.n_layers)} <= idle
    assert [of.name for of in left.circuit.groups] == ["all"]
    assert left.after >= (1 - 1e-9) * left.before
