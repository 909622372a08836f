"""Published Llama-7B numbers (Prakash et al., ICLR 2024): our selection gives their circuit from their scores.

The numbers are not part of this repository. They are read from `../shared/reference_data` beside it, or from the
folder in the environment variable REFERENCE_DATA; without them these tests are skipped.
"""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stages.circuits.circuit import Circuit, Component
from stages.circuits.given_hops import HopSpec, given_hops
from stages.circuits.pairs import Pairs
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.rule import Rule
from stages.circuits.scores import Metric, Scores, score
from stages.circuits.search import Hop
from stages.circuits.selection import strongest
from stages.figures.circuit_picture import picture
from stages.measures.circuit_in_place import faithfulness
from stages.measures.overlap import circuit_overlap
from stages.tasks.old.boxes import Boxes
from stages.tasks.published import entity_tracking
from tests.conftest import REPOSITORY

FOLDER = Path(os.environ.get("REFERENCE_DATA", REPOSITORY.parent / "shared" / "reference_data"))
CIRCUIT = FOLDER / "circuits" / "llama_circuit.json"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "path_patching").is_dir(),
    reason=f"the published numbers are not at {FOLDER}; the variable REFERENCE_DATA can name another folder",
)
LAYERS = HEADS = 32
RECEIVERS, POOLS = (20, 5, 10, 5), (58, 10, 25, 5)
GROUPS = tuple(name for name, _, _, _ in Boxes.paper_hops)
METRIC = Metric.RELATIVE_PROBABILITY
RULE = Rule(0.02, 0.005, 4.0, 0.9, 0.5, 4)


def published_scores(group: str) -> Float[Tensor, "layers h"]:
    with (FOLDER / "path_patching" / f"llama_{group}.csv").open() as file:
        return torch.tensor([[float(value) for value in row] for row in csv.reader(file)], dtype=torch.float64)


def published_circuit() -> dict[str, set[tuple[int, int]]]:
    data = json.loads(CIRCUIT.read_text())
    return {group: {(layer, head) for layer, head in heads} for group, heads in data.items()}


def published_hop(number: int) -> Hop:
    name, position, receiver, component = Boxes.paper_hops[number]
    scores = Scores.of(METRIC, published_scores(name), torch.zeros(LAYERS, HEADS, dtype=torch.float64))
    into = None if component is None else Component(component)
    return Hop(name, position, receiver, into, scores, scores=scores)


class Published(PathPatcher):
    """Gives per-example effects whose scores are the published ones, hop after hop; p varies between examples."""

    def __init__(self) -> None:
        positions = {name: torch.zeros(4, dtype=torch.long) for name in ("last", "query_label", "earlier_label")}
        pairs: Any = SimpleNamespace(positions=positions)
        walker: Any = SimpleNamespace(n_layers=LAYERS, n_heads=HEADS)
        self.pairs, self.walker = pairs, walker
        self._every_head = torch.eye(LAYERS * HEADS, dtype=torch.bool).view(-1, LAYERS, HEADS)
        self.clean = torch.tensor([0.2, 0.4, 0.8, 0.9], dtype=torch.float64)
        self.corrupt = torch.full((4,), 0.01, dtype=torch.float64)
        self.asked: list[tuple[str, Receivers]] = []

    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        (receiver,) = receivers
        if len(senders) == 1:  # all heads together
            return [-0.5 * self.clean[None]]
        self.asked.append((position, receiver))
        scores = published_scores(GROUPS[len(self.asked) - 1]).flatten()
        uneven = torch.tensor([0.5, 1.5, 0.8, 1.2], dtype=torch.float64)  # of mean 1
        return [scores[:, None] * uneven * self.clean]


@pytest.mark.parametrize(
    ("number", "upper", "lowest_zero", "zeros"), [(1, 0, 30, 64), (2, 1, 19, 416), (3, 2, 13, 608)]
)
def test_receivers_explain_the_exact_zeros(number, upper, lowest_zero, zeros):
    """Senders at or above the highest receiver do nothing, and the receivers are our k strongest heads."""
    receivers = published_hop(upper).strongest(RECEIVERS[upper])
    assert max(layer for layer, _ in receivers) == lowest_zero
    found = published_scores(GROUPS[number])
    assert bool((found[lowest_zero:] == 0).all()) and bool((found[:lowest_zero] != 0).all())
    assert int((found == 0).sum()) == zeros


def test_paper_hops_on_the_published_scores_give_the_published_pools():
    patcher = Published()
    specs = [HopSpec(*hop) for hop in Boxes.paper_hops]
    circuit, hops = given_hops(patcher, METRIC, RULE, specs, RECEIVERS, POOLS, lambda hop: None)
    assert [len(hop.heads) for hop in hops] == [50, 10, 25, 5]
    assert [group.name for group in circuit.groups] == list(GROUPS) and len(circuit.nodes) == 90
    for hop in hops:
        assert hop.scores is not None
        error = float((hop.scores.score - published_scores(hop.name)).abs().max())
        print(f"{hop.name}: {len(hop.heads)} heads, largest error of a score {error:.1e}")
        assert error < 1e-12
        assert published_circuit()[hop.name] <= set(hop.heads)
    # each hop fed the strongest heads of the one before, also those that its own pool lost to a later one
    assert [(position, len(receiver.heads), receiver.component) for position, receiver in patcher.asked] == [
        ("last", 0, None),
        ("last", 20, "q"),
        ("query_label", 5, "v"),
        ("earlier_label", 10, "v"),
    ]
    assert patcher.asked[1][1].heads == published_hop(0).strongest(20)
    assert set(hops[1].heads) & set(patcher.asked[1][1].heads) and not set(hops[1].heads) & set(hops[0].heads)
    assert Circuit.from_json(json.loads(json.dumps(circuit.to_json()))) == circuit


def test_the_circuit_lies_among_the_strongest_heads():
    """Of the n strongest heads of a group of n, so many are in the published circuit."""
    circuit = published_circuit()
    assert [len(circuit[group]) for group in GROUPS] == [40, 7, 20, 5]
    transmitters = set(published_hop(1).strongest(POOLS[1]))
    shared = []
    for number, group in enumerate(GROUPS):
        order = [head for head in published_hop(number).strongest(POOLS[number])]
        if number == 0:
            order = [head for head in order if head not in transmitters]
        shared.append(len(set(order[: len(circuit[group])]) & circuit[group]))
    print(dict(zip(GROUPS, shared, strict=True)))
    assert shared == [33, 6, 17, 5]


def test_the_strongest_heads_are_the_published_ones():
    named = {"value_fetcher": {(14, 27), (15, 13)}, "pos_transmitter": {(14, 27), (11, 23), (12, 23)}}
    named |= {"pos_detector": {(10, 3), (13, 14)}, "struct_reader": {(8, 21), (12, 23), (11, 9)}}
    tops = {"value_fetcher": 3, "pos_transmitter": 3, "pos_detector": 2, "struct_reader": 3}
    cut = {"value_fetcher": -0.0136, "pos_transmitter": -0.0538, "pos_detector": -0.0121, "struct_reader": -0.0200}
    for number, group in enumerate(GROUPS):
        hop = published_hop(number)
        assert named[group] <= set(hop.strongest(tops[group]))
        weakest = hop.strongest(POOLS[number])[-1]
        assert hop.scores is not None
        assert float(hop.scores.score[weakest]) == pytest.approx(cut[group], abs=5e-5)
        assert set(hop.strongest(POOLS[number])) == {
            (layer, head)
            for layer in range(LAYERS)
            for head in range(HEADS)
            if float(hop.scores.score[layer, head]) <= float(hop.scores.score[weakest])
        }


def test_the_score_is_the_published_one():
    """(p_patched - p_clean) / p_clean, a mean of ratios; more negative is stronger."""
    published = published_scores("value_fetcher")
    clean = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    patched = clean * (1 + published[..., None])
    found = score(METRIC, patched - clean, clean, torch.zeros_like(clean))
    assert torch.allclose(found.score, published, rtol=0, atol=1e-12)
    assert bool((found.noise < 1e-12).all())
    assert strongest(found)[0] == (15, 13) and float(found.strength[15, 13]) == pytest.approx(0.0847760886)


def test_the_published_circuit_is_evaluated_compared_and_drawn(tmp_path: Path) -> None:
    """In a model of Llama-7B's layers and heads with random weights, where it does nothing in particular."""
    circuit = Circuit.from_heads(**entity_tracking(json.loads(CIRCUIT.read_text())))
    assert len(circuit.nodes) == 72 and (circuit.n_layers, circuit.n_heads) == (LAYERS, HEADS)
    assert {group.name: (group.position, group.receiver) for group in circuit.groups} == {
        hop.name: (hop.position, hop.receiver) for hop in Boxes.paper_hops
    }
    path = tmp_path / "circuit.json"
    circuit.save(path)
    assert Circuit.load(path) == circuit
    drawing = picture(circuit, tmp_path / "circuit.svg", title="Llama-7B").read_text()
    assert all(name in drawing for name in GROUPS) and ">15.13<" in drawing

    pools = {hop.name: published_hop(number).strongest(POOLS[number]) for number, hop in enumerate(Boxes.paper_hops)}
    both = circuit_overlap(circuit, Circuit.from_heads(**entity_tracking(pools)))
    print(both)
    # 8 of the pools' heads are both value fetchers and position transmitters
    assert both["one"] == both["both"] == 72 and both["other"] == 90
    assert both["share"] == pytest.approx(72 / 90) and both["chance"] is not None and both["chance"] < 0.05
    same = circuit_overlap(circuit, circuit)
    assert same["share"] == same["jaccard"] == same["corrected"] == 1.0

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=2, initializer_range=0.1,
    )  # fmt: skip
    ids = torch.randint(50, (2, 6, 54), generator=torch.Generator().manual_seed(1))
    clean, corrupt = ([tuple(row) for row in part.tolist()] for part in ids)
    spans = {"last": ((53,),) * 6, "query_label": ((51,),) * 6, "earlier_label": tuple((6 + 7 * k,) for k in range(6))}
    pairs = Pairs(tuple(clean), tuple(corrupt), ((1,),) * 6, (((2,), (3,)),) * 6, spans, spans)
    found = faithfulness(LlamaForCausalLM(config).eval(), circuit, pairs, random_circuits=3)
    print(found)
    assert found.nodes == 72
