"""Mean-ablated circuits against whole hooked passes, and what follows from their definition."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.circuits.ablation import ablated_run, circuits_in_place, mean_outputs, nodes_removed
from stages.circuits.circuit import Circuit, Component, Group, Node
from stages.circuits.exchange import Positions, random_nodes, random_weights
from stages.circuits.walker import Walker
from stages.evaluate import evaluate
from stages.measures.faithfulness import circuit_record, evaluate_circuits, evaluate_groups, outcomes
from stages.measures.prompts import AnsweredPrompts, in_tail_order, tail_order
from stages.measures.readout import Readout, reading
from stages.pipeline.resources import Resources
from stages.pipeline.stage import Invalid
from stages.tasks.examples import Examples, Prompts
from tests.oracles import FAMILIES, random_model, walker_of
from tests.oracles_ablation import (
    POSITIONS,
    every_node,
    naive_circuit,
    naive_exchange,
    naive_means,
    random_circuit,
    random_positions,
    random_prompts,
    several_positions,
)

MEMORY = 64.0
IDS, AT = random_prompts(), random_positions()


def largest(a: Tensor, b: Tensor, what: str) -> float:
    error = float((a - b).detach().abs().max())
    print(f"{what}: max error {error:.1e}")
    return error


def means_of(walker: Walker) -> Tensor:
    return mean_outputs(walker, random_prompts(20, seed=1), MEMORY)


@pytest.mark.parametrize("at", [AT, several_positions()], ids=["one_index", "several"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_circuits_equal_whole_hooked_passes(kind: str, at: Positions) -> None:
    model = random_model(kind)
    walker = walker_of(model)
    means = means_of(walker)
    assert largest(means, naive_means(model, random_prompts(20, seed=1)), "means") <= 1e-9
    last_only = frozenset({Node(1, 2, "last"), Node(2, 0, "last")})
    high_only = frozenset({Node(2, 1, "earlier_label"), Node(2, 3, "last")})
    circuits = [random_circuit(3, 4, share, seed) for share, seed in ((0.1, 0), (0.5, 1), (0.9, 2))]
    circuits += [last_only, high_only]
    background = ablated_run(walker, IDS, means)
    ours = circuits_in_place(walker, background, means, at, circuits, MEMORY)
    for index, circuit in enumerate(circuits):
        naive = naive_circuit(model, IDS, means, at, circuit)
        assert largest(ours[:, index], naive, f"{kind}, {len(circuit)} nodes") <= 1e-9
        alone = circuits_in_place(walker, background, means, at, [circuit], MEMORY)[:, 0]  # fewer sites in the window
        assert largest(alone, naive, "alone") <= 1e-9
    effect = largest(ours[:, 1], background.logits, "effect of a circuit (must not be small)")
    assert effect > 1e-2


@pytest.mark.parametrize("at", [AT, several_positions()], ids=["one_index", "several"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_removed_nodes_equal_whole_hooked_passes(kind: str, at: Positions) -> None:
    model = random_model(kind)
    walker = walker_of(model)
    means = means_of(walker)
    clean = walker.run(IDS)
    for nodes in (
        random_circuit(3, 4, 0.2, 3),
        frozenset({Node(1, 2, "last")}),
        frozenset({Node(0, 1, "earlier_label")}),
    ):
        at_mean = {node: means[node.layer, at[node.position], node.head] for node in nodes}
        naive = naive_exchange(model, IDS, at_mean, at, dict.fromkeys(nodes, 1.0))
        for memory in (MEMORY, 1e-6):
            ours = nodes_removed(walker, clean, means, at, nodes, memory)
            assert largest(ours, naive, f"{kind}, {len(nodes)} removed") <= 1e-9
        assert largest(clean.logits, naive, "effect (must not be small)") > 1e-3
    assert torch.equal(nodes_removed(walker, clean, means, AT, [], MEMORY), clean.logits)


def test_all_nodes_at_all_positions_are_the_whole_model() -> None:
    walker = walker_of(random_model("llama_gqa"))
    means = means_of(walker)
    length = IDS.shape[1]
    positions = {f"position_{t}": torch.full((len(IDS),), t) for t in range(length - 1)}
    positions["last"] = torch.full((len(IDS),), length - 1)
    everything = [Node(layer, head, name) for layer in range(3) for head in range(4) for name in positions]
    background = ablated_run(walker, IDS, means)
    kept = circuits_in_place(walker, background, means, positions, [everything, []], MEMORY)
    assert largest(kept[:, 0], walker.run(IDS).logits, "whole model") <= 1e-9
    assert largest(kept[:, 1], background.logits, "empty circuit") <= 1e-9
    assert largest(kept[:, 0], kept[:, 1], "distance of the two (must not be small)") > 1e-2


def test_heads_are_kept_at_a_position_that_two_names_share() -> None:
    walker = walker_of(random_model("llama"))
    means = means_of(walker)
    background = ablated_run(walker, IDS, means)
    by_label = frozenset({Node(0, 1, "earlier_label"), Node(1, 2, "earlier_separator"), Node(2, 0, "last")})
    both = frozenset({Node(0, 1, "earlier_label"), Node(1, 2, "earlier_label"), Node(2, 0, "last")})
    first, second = circuits_in_place(walker, background, means, AT, [by_label, both], MEMORY).unbind(1)
    assert torch.allclose(first[0], second[0], atol=1e-12), "example 0 has label and separator at one position"
    assert not torch.allclose(first[2], second[2], atol=1e-6)


def test_the_memory_limit_changes_no_result() -> None:
    walker = walker_of(random_model("llama"))
    means = means_of(walker)
    background = ablated_run(walker, IDS, means)
    circuits = [random_circuit(3, 4, 0.3, seed) for seed in range(5)]
    much = circuits_in_place(walker, background, means, AT, circuits, MEMORY)
    little = circuits_in_place(walker, background, means, AT, circuits, 1e-6)
    assert largest(much, little, "memory") <= 1e-12
    assert largest(means, mean_outputs(walker, random_prompts(20, seed=1), 1e-6), "means") <= 1e-12


def test_random_circuits_have_the_shape_of_the_circuit() -> None:
    circuit = random_circuit(3, 4, 0.3, 0)
    drawn = [random_nodes(circuit, 3, 4, np.random.default_rng([7, 0])) for _ in range(2)]
    assert drawn[0] == drawn[1]
    for position in POSITIONS:
        count = sum(node.position == position for node in circuit)
        assert sum(node.position == position for node in drawn[0]) == count
    full = frozenset(every_node(3, 4))
    assert random_nodes(full, 3, 4, np.random.default_rng(0)) == full, "drawn without replacement"
    weights = random_weights(50, [2, 12, 0], 3, 4, np.random.default_rng(0))
    assert weights.shape == (50, 1, 3, 3, 4)
    assert weights.sum((1, 2, 4)).unique(dim=0).tolist() == [[2, 12, 0]]
    assert len(weights[:, 0, :, 0].flatten(1).unique(dim=0)) > 20, "every example has its own draw"


def test_readouts_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0, 0.0]], [[3.0, 0.0, 0.0, 0.0]]])
    readout = Readout.of(logits, torch.tensor([1, 1]), torch.tensor([[2, 3], [0, 2]]))
    assert readout.correct[:, 0].tolist() == [True, False]
    assert readout.logit_difference[:, 0].tolist() == [1.5, -1.5]
    expected = torch.softmax(logits[:, 0].double(), -1)[:, 1]
    assert torch.allclose(readout.p_correct[:, 0], expected, atol=1e-12)
    kept = {"accuracy": 0.4, "candidate_accuracy": 0.6, "logit_difference": 1.0, "p_correct": 0.1}
    full = {"accuracy": 0.8, "candidate_accuracy": 0.8, "logit_difference": -1.0, "p_correct": 0.4}
    assert circuit_record(3, kept, full) == {
        "size": 3,
        **kept,
        "faithfulness": 0.5,
        "faithfulness_candidates": pytest.approx(0.75),
        "faithfulness_ld": None,
        "faithfulness_p": 0.25,
    }


def test_candidates_may_be_fewer_in_some_prompts() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0, 5.0]], [[3.0, 1.0, 2.0, 0.0]]])
    answer, others = torch.tensor([1, 0]), torch.tensor([[2, -1], [1, 2]])
    readout = Readout.of(logits, answer, others)
    assert readout.logit_difference[:, 0].tolist() == [1.0, 1.5]
    assert readout.correct[:, 0].tolist() == [False, True], "over the whole vocabulary another token is the likeliest"
    assert readout.best_candidate[:, 0].tolist() == [True, True]
    assert [entry["candidate_accuracy"] for entry in readout.means()] == [1.0]
    tie = Readout.of(torch.zeros(1, 1, 4), torch.tensor([1]), torch.tensor([[2, 3]]))
    assert tie.means()[0]["candidate_accuracy"] == 0.0, (
        "an answer that ties with another candidate is not the likeliest"
    )
    with pytest.raises(Invalid, match="no candidate"):
        AnsweredPrompts(IDS[:2], answer, torch.tensor([[-1, -1], [1, 2]]), {})


def test_logits_are_read_alike_whole_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0))
    answer, others = torch.arange(5), torch.tensor([[5, 6]] * 5)
    whole = Readout.of(logits, answer, others)
    monkeypatch.setattr("stages.measures.readout.EXACT", 8)
    parts = [reading(answer, others)(logits[rows], rows) for rows in (slice(0, 2), slice(2, 5))]
    for a, b in zip(vars(whole).values(), vars(Readout.join(parts)).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2"])
def test_the_position_that_is_read_out_needs_no_name(kind: str) -> None:
    """Circuits at positions none of which is the last one, and under any name for the last."""
    model = random_model(kind)
    walker = walker_of(model)
    means = means_of(walker)
    background = ablated_run(walker, IDS, means)
    at = {"somewhere": AT["earlier_label"], "elsewhere": AT["earlier_separator"]}
    circuits = [[Node(0, 1, "somewhere"), Node(1, 2, "elsewhere")], []]
    ours = circuits_in_place(walker, background, means, at, circuits, MEMORY)
    for index, circuit in enumerate(circuits):
        assert largest(ours[:, index], naive_circuit(model, IDS, means, at, circuit), "no name") <= 1e-9
    named = {**at, "end": AT["last"]}
    circuits = [[*circuits[0], Node(2, 0, "end")], circuits[0]]
    ours = circuits_in_place(walker, background, means, named, circuits, MEMORY)
    for index, circuit in enumerate(circuits):
        assert largest(ours[:, index], naive_circuit(model, IDS, means, named, circuit), "a name") <= 1e-9


def test_prompts_of_several_lengths_are_groups_with_their_own_means() -> None:
    model = random_model("llama_gqa")
    walker = walker_of(model)
    circuit = random_circuit(3, 4, 0.4, 0)
    groups, expected = [], []
    for length in (20, 24):
        ids, at = random_prompts(length=length), random_positions(length=length)
        means = mean_outputs(walker, random_prompts(20, length, seed=1), MEMORY)
        prompts = AnsweredPrompts(ids, torch.arange(6), torch.tensor([[7, 8, 9]] * 6), at)
        groups.append((prompts, means))
        logits = naive_circuit(model, ids, means, at, circuit)[:, None]
        expected.append(Readout.of(logits, prompts.answer, prompts.others).logit_difference[:, 0])
    found = evaluate_groups(walker, groups, [circuit, []], [circuit], MEMORY)
    small = evaluate_groups(walker, groups, [circuit, []], [circuit], 1e-6, processes=2)
    assert found.full.correct.shape == (12, 1) and found.without.correct.shape == (12, 1)
    assert largest(found.in_place.logit_difference[:, 0], torch.cat(expected), "both lengths") <= 1e-9
    for kind in ("full", "in_place", "without"):
        ours, others = (getattr(evaluation, kind).logit_difference for evaluation in (found, small))
        assert largest(ours, others, f"{kind}, little memory and two processes") <= 1e-12
    with pytest.raises(Invalid, match="groups of prompts"):
        evaluate_groups(walker, [], [circuit], [], MEMORY)


def test_evaluation_of_a_model() -> None:
    model = random_model("qwen2")
    walker = walker_of(model)
    means = means_of(walker)
    examples = Examples(IDS, torch.arange(6), torch.tensor([[7, 8, 9]] * 6), AT, {}, IDS, AT)
    ordered = in_tail_order(examples, {"earlier_label", "last"})
    assert ordered.positions["earlier_label"].tolist() == sorted(AT["earlier_label"].tolist())
    circuit, removed = random_circuit(3, 4, 0.5, 0), random_circuit(3, 4, 0.1, 1)
    found = evaluate_circuits(walker, means, ordered, [circuit], [removed], MEMORY)
    small = evaluate_circuits(walker, means, ordered, [circuit], [removed], 1e-6)
    for kind in ("full", "in_place", "without"):
        error = getattr(found, kind).logit_difference - getattr(small, kind).logit_difference
        assert float(error.abs().max()) <= 1e-12
        assert getattr(found, kind).correct.shape == (6, 1)
    naive = naive_circuit(model, ordered.input_ids, means, ordered.positions, circuit)
    expected = Readout.of(naive[:, None], ordered.answer, ordered.others)
    assert largest(found.in_place.logit_difference, expected.logit_difference, "logit difference") <= 1e-9
    assert evaluate_circuits(walker, means, ordered, [], [], MEMORY).without.correct.shape == (6, 0)


def test_outcomes_stand_in_the_order_of_the_file() -> None:
    examples = Examples(IDS, torch.arange(6), torch.tensor([[7, 8, 9]] * 6), AT, {}, IDS, AT)
    order = tail_order(examples, {"earlier_label", "last"})
    assert order.tolist() != list(range(6))
    right = torch.tensor([True, True, False, True, False, False])
    assert outcomes(right[order], order) == "110100"
    assert outcomes(right, tail_order(examples, set())) == "110100"


def test_record_of_the_stage() -> None:
    walker = walker_of(random_model("llama"))
    other = walker_of(random_model("llama", seed=1))
    examples = Examples(IDS, walker.run(IDS).logits.argmax(-1), torch.tensor([[7, 8, 9]] * 6), AT, {}, IDS, AT)
    new = Prompts(IDS, torch.tensor([[0, -1]] * 6), torch.zeros(6, dtype=torch.long), torch.tensor([[7, 8, 9]] * 6))
    groups = (
        Group("fetch", "last", "logits", None, ((2, 0), (1, 3))),
        Group("bind", "earlier_separator", "fetch", Component.V, ((0, 1),)),
    )
    circuit = Circuit(groups, 3, 4)
    nothing = Circuit((), 3, 4, identifiable=False)
    settings, available = SimpleNamespace(random_circuits=4, clauses="every"), Resources(2, MEMORY)

    def record(model: Walker, own: Circuit) -> dict[str, Any]:
        return evaluate(model, mean_outputs(model, IDS, MEMORY), circuit, own, examples, new, settings, 0, available)

    of_base = record(walker, circuit)
    assert of_base["old_accuracy"] == 1.0
    assert of_base["own_circuit"] == of_base["circuit"]
    assert of_base["examples"]["model"] == "111111"
    assert of_base["circuit"]["size"] == 3
    assert set(of_base["groups"]) == {"fetch", "bind"}
    assert len(of_base["random"]["accuracies"]) == 4
    tuned = record(other, nothing)
    assert tuned["own_circuit"] is None
    assert record(other, nothing) == tuned
    empty = evaluate(other, mean_outputs(other, IDS, MEMORY), nothing, nothing, examples, new, settings, 0, available)
    assert empty["circuit"] is None and empty["circuit_in_queried_clause"] is None
    assert set(empty["examples"]) == {"model", "model_candidates"}
    for entry in (of_base, tuned):
        for part, accuracy in (("model", entry["old_accuracy"]), ("circuit", entry["circuit"]["accuracy"])):
            assert entry["examples"][part].count("1") / 6 == accuracy
    alone = other.run(IDS).logits.argmax(-1) == examples.answer  # in the order of IDS
    assert tuned["examples"]["model"] == "".join(str(int(right)) for right in alone)
