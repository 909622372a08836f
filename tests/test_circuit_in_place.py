"""A circuit in place over prompts of several lengths, against whole hooked passes group by group."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from stages.circuits import load
from stages.circuits.circuit import Circuit, Node
from stages.circuits.exchange import random_nodes
from stages.circuits.pairs import Pairs
from stages.circuits.walker import Walker
from stages.measures.circuit_in_place import Scores, faithfulness, in_place
from stages.measures.prompts import AnsweredPrompts
from stages.measures.scores import ABLATIONS
from stages.pipeline.stage import Invalid
from stages.tasks.ioi import ioi_prompts
from tests.oracles import float64_softmax, head_outputs, hooked_logits, random_model
from tests.oracles_ablation import naive_circuit, naive_means, random_circuit, random_positions, random_prompts

Group = tuple[AnsweredPrompts, Int[Tensor, "m t"]]


def groups_of(model: PreTrainedModel, lengths: Collection[int] = (13, 17)) -> list[Group]:
    """Prompts of each length and more reference prompts; for most of them the answer is what the model says."""
    found = []
    for seed, length in enumerate(lengths):
        n = 6
        ids = random_prompts(n, length, seed=seed)
        with torch.no_grad():
            best = model(ids).logits[:, -1].topk(4).indices
        best[0] = best[0].flip(0)
        prompts = AnsweredPrompts(ids, best[:, 0], best[:, 1:], random_positions(n, length, seed))
        found.append((prompts, random_prompts(9, length, seed=seed + 10)))
    return found


def naive_scores(logits: Float[Tensor, "n vocab"], answer: Int[Tensor, " n"], others: Int[Tensor, "n k"]) -> Scores:
    """One prompt after the other."""
    rows: list[tuple[float, ...]] = []
    for row in range(len(logits)):
        right, rest = float(logits[row, answer[row]]), [float(logits[row, other]) for other in others[row]]
        likeliest = float(int(logits[row].argmax()) == int(answer[row]))
        p = float(logits[row].softmax(-1)[answer[row]])
        rows.append((right - sum(rest) / len(rest), likeliest, float(right > max(rest)), p))
    return Scores(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def naive(model: PreTrainedModel, groups: list[Group], nodes: Collection[Node] | None) -> Scores:
    """Scores over all groups with these nodes in place; None: of the whole model."""
    logits = []
    for prompts, reference in groups:
        if nodes is None:
            logits.append(hooked_logits(model, prompts.input_ids))
        else:
            means = naive_means(model, reference)
            logits.append(naive_circuit(model, prompts.input_ids, means, prompts.positions, nodes))
    answers = torch.cat([prompts.answer for prompts, _ in groups])
    return naive_scores(torch.cat(logits), answers, torch.cat([prompts.others for prompts, _ in groups]))


def difference(one: Scores, other: Scores) -> float:
    return max(abs(getattr(one, name) - getattr(other, name)) for name in vars(one))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_score_is_that_of_whole_passes(family: str) -> None:
    model: Any = random_model(family).double()
    with float64_softmax():
        walker, groups = Walker(model), groups_of(model)
        nodes = random_circuit(walker.n_layers, walker.n_heads, 0.3, seed=1)
        found = in_place(walker, groups, nodes, "corrupt", random_circuits=3, seed=5)
        generator = np.random.default_rng(5)
        random = [random_nodes(nodes, walker.n_layers, walker.n_heads, generator) for _ in range(3)]
        variants = [(found.model, None), (found.circuit, nodes), (found.nothing, frozenset())]
        variants += zip(found.random, random, strict=True)
        worst = max(difference(scores, naive(model, groups, kept)) for scores, kept in variants)
    print(f"{family}: largest difference of a score {worst:.1e} (logit difference {found.model.logit_difference:.2f})")
    assert worst < 1e-10
    assert (found.nodes, found.groups, found.reference) == (len(nodes), {13: 6, 17: 6}, "corrupt")
    assert found.faithfulness == pytest.approx(found.circuit.logit_difference / found.model.logit_difference)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_what_is_around_a_circuit_is_that_of_whole_passes(ablation: str) -> None:
    """Means, or the outputs in each prompt's partner, of the model or of another one."""
    model, base = random_model("llama_gqa"), random_model("llama_gqa", seed=1)
    groups = [(prompts, ids[: len(prompts)]) for prompts, ids in groups_of(model)]
    nodes = random_circuit(3, 4, 0.4, seed=1)
    of_base = Walker(base) if ablation.startswith("base_") else None
    found = in_place(Walker(model), groups, nodes, "corrupt", 2, 5, ablation=ablation, base=of_base)
    small = in_place(Walker(model), groups, nodes, "corrupt", 2, 5, 1e-6, 2, ablation, of_base)
    generator = np.random.default_rng(5)
    variants = [(found.circuit, nodes), (found.nothing, frozenset())]
    variants += zip(found.random, [random_nodes(nodes, 3, 4, generator) for _ in range(2)], strict=True)
    outside, errors = base if of_base else model, [difference(found.model, naive(model, groups, None))]
    for scores, kept in variants:
        logits = []
        for prompts, ids in groups:
            if ablation.endswith("means"):
                given = [naive_means(outside, ids)] * len(prompts)
            else:
                given = torch.stack(head_outputs(outside, ids)).unflatten(-1, (4, -1)).unbind(1)
            logits += [  # one prompt after the other
                naive_circuit(
                    model, prompts.input_ids[[row]], z, {p: at[[row]] for p, at in prompts.positions.items()}, kept
                )
                for row, z in enumerate(given)
            ]
        answers, others = (torch.cat([getattr(p, name) for p, _ in groups]) for name in ("answer", "others"))
        errors.append(difference(scores, naive_scores(torch.cat(logits), answers, others)))
    print(f"{ablation}: largest difference of a score {max(errors):.1e}")
    assert max(errors) <= 1e-9 and found.ablation == ablation
    assert difference(found.circuit, small.circuit) <= 1e-9 < difference(found.circuit, found.nothing)


def test_everything_in_place_is_the_model_and_groups_are_their_mean() -> None:
    model: Any = random_model("llama").double()
    walker, groups = Walker(model), groups_of(model)
    everywhere = []
    for prompts, reference in groups:  # every token has a name
        n, length = prompts.input_ids.shape
        positions = {str(token): torch.full((n,), token) for token in range(length)}
        everywhere.append((AnsweredPrompts(prompts.input_ids, prompts.answer, prompts.others, positions), reference))
    for group in everywhere:
        nodes = [
            Node(layer, head, name)
            for layer in range(walker.n_layers)
            for head in range(walker.n_heads)
            for name in group[0].positions
        ]
        found = in_place(walker, [group], nodes, "corrupt", random_circuits=0)
        assert difference(found.circuit, found.model) < 1e-10 < difference(found.nothing, found.model)
        assert found.faithfulness == pytest.approx(1) and found.floor is None
    nodes = random_circuit(walker.n_layers, walker.n_heads, 0.3, seed=1)
    both = in_place(walker, groups, nodes, "corrupt", random_circuits=0)
    single = [in_place(walker, [group], nodes, "corrupt", random_circuits=0) for group in groups]
    mean = sum(found.circuit.logit_difference for found in single) / 2
    assert both.circuit.logit_difference == pytest.approx(mean, abs=1e-12)


def test_it_can_be_read_and_kept() -> None:
    model: Any = random_model("llama").double()
    walker, groups = Walker(model), groups_of(model)
    nodes = random_circuit(walker.n_layers, walker.n_heads, 0.3, seed=1)
    found = in_place(walker, groups, nodes, "corrupt", random_circuits=2)
    lines = str(found).splitlines()
    print(found)
    assert lines[1] == "own means of the corrupt prompts of the same length; prompts: 6 of 13 tokens, 6 of 17 tokens"
    assert [line.split("  ")[0] for line in lines[3:]] == [
        "whole model",
        f"circuit, {len(nodes)} nodes",
        "nothing",
        "2 random circuits",
    ]
    assert f"{found.circuit.logit_difference:.3f}" in lines[4] and f"{found.model.p_correct:.4f}" in lines[3]
    kept = json.loads(json.dumps(found.to_json()))
    assert kept["groups"] == {"13": 6, "17": 6} and len(kept["random"]) == 2
    assert kept["circuit"]["p_correct"] == found.circuit.p_correct and kept["faithfulness"] == found.faithfulness


def test_in_one_call_on_a_real_model(smollm2: Path) -> None:
    """The heads that move names in SmolLM2, and those that tell them which, do more than random ones of their shape."""
    walker, tokenizer = load(smollm2)
    pairs = Pairs.from_text(tokenizer, **ioi_prompts(tokenizer, 6, seed=0).texts())
    heads = {"movers": ["23.3", "29.1", "23.0", "23.2"], "inhibition": ["17.4", "15.7", "8.1", "17.0"]}
    circuit = Circuit.from_heads(heads, {"movers": "end", "inhibition": "s2"}, walker.n_layers, walker.n_heads)
    found = faithfulness(walker, circuit, pairs, random_circuits=3)
    print(found)
    assert found.groups == {14: 2, 17: 2, 18: 2} and found.nodes == 8
    assert found.model.accuracy >= 0.9 and found.model.candidate_accuracy >= found.model.accuracy
    assert abs(found.nothing.logit_difference) < 0.3 * found.model.logit_difference
    assert found.floor is not None and found.faithfulness is not None
    assert found.faithfulness > 0.2 + found.floor
    again = faithfulness(walker.model, circuit.nodes, pairs, random_circuits=3, memory_mib=100)
    assert difference(found.circuit, again.circuit) < 1e-4
    with pytest.raises(Invalid, match="reference = 'mean': must be one of corrupt, clean"):
        faithfulness(walker, circuit, pairs, reference="mean")
    with pytest.raises(Invalid, match="position 'nowhere': must be one of end, io, s1, s1"):
        faithfulness(walker, [Node(0, 0, "nowhere")], pairs)
    with pytest.raises(Invalid, match="the circuit has head 30.0: must be a layer from 0 to 29"):
        faithfulness(walker, [Node(30, 0, "end")], pairs)


def pairs_of(groups: list[Group]) -> Pairs:
    """The same prompts with their answers as pairs, those of different lengths in turn; spans of one and two tokens."""
    rows: list[Any] = []
    for prompts, reference in groups:
        for row in range(len(prompts)):
            spans = {name: (int(at[row]),) for name, at in prompts.positions.items()}
            others = [(token,) for token in prompts.others[row].tolist()][: 1 + row % 3]
            answer = (int(prompts.answer[row]),)
            rows.append((tuple(prompts.input_ids[row].tolist()), tuple(reference[row].tolist()), answer, others, spans))
    rows = rows[::2] + rows[1::2]
    clean, corrupt, answer, others, spans = zip(*rows, strict=True)
    places = {name: tuple(span[name] for span in spans) for name in spans[0]}
    return Pairs(clean, corrupt, answer, tuple(map(tuple, others)), places, places)


def test_pairs_are_grouped_by_length() -> None:
    model: Any = random_model("llama").double()
    walker = Walker(model)
    pairs = pairs_of(groups_of(model))
    nodes = random_circuit(walker.n_layers, walker.n_heads, 0.3, seed=1)
    for reference in ("corrupt", "clean"):
        found = faithfulness(walker, nodes, pairs, random_circuits=0, reference=reference)
        assert found.groups == {13: 6, 17: 6} and found.reference == reference
        rows: list[float] = []  # one prompt after the other, with the means of its length
        for row in range(len(pairs)):
            of_length = [other for other in range(len(pairs)) if len(pairs.clean[other]) == len(pairs.clean[row])]
            chosen = pairs.corrupt if reference == "corrupt" else pairs.clean
            means = naive_means(model, torch.tensor([chosen[other] for other in of_length]))
            at = {name: torch.tensor(spans[row]) for name, spans in pairs.spans.items()}
            logits = naive_circuit(model, torch.tensor([pairs.clean[row]]), means, at, nodes)[0]
            rest = [float(logits[other[0]]) for other in pairs.others[row]]
            rows.append(float(logits[pairs.answer[row][0]]) - sum(rest) / len(rest))
        assert found.circuit.logit_difference == pytest.approx(sum(rows) / len(rows), abs=1e-7)
    with pytest.raises(Invalid, match="example 0 has an answer or another candidate of several tokens"):
        several = ((*pairs.answer[0], 1), *pairs.answer[1:])
        faithfulness(walker, nodes, replace(pairs, answer=several))
    with pytest.raises(Invalid, match="reference = 'corrupt': prompts of 13 tokens have corrupt partners of"):
        faithfulness(walker, nodes, replace(pairs, corrupt=tuple(ids + (0,) for ids in pairs.corrupt)))


def test_bad_input_is_refused() -> None:
    model = random_model("llama")
    walker, groups = Walker(model), groups_of(model)
    with pytest.raises(Invalid, match="the circuit has no node"):
        in_place(walker, groups, (), "corrupt")
    with pytest.raises(Invalid, match="random_circuits = -1: must be 0 or more"):
        in_place(walker, groups, [Node(0, 0, "last")], "corrupt", random_circuits=-1)
    base, one = Walker(random_model("llama", seed=1)), [Node(0, 0, "last")]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"ablation": "means"}, "ablation = 'means': must be one of own_means, base_means, resampled, base_resampled"),
        ({"ablation": "base_means"}, "ablation = 'base_means': base must be the model whose heads give it, not None"),
        ({"ablation": "resampled", "base": base}, "ablation = 'resampled': base must be None"),
        ({"ablation": "resampled"}, r"resampled from prompts of shape \[9, 13\]: must be one for each prompt"),
    ]
    for said, sentence in bad:
        with pytest.raises(Invalid, match=sentence):
            in_place(walker, groups, one, "corrupt", **said)
    with pytest.raises(Invalid, match="reference = 'clean': must be 'corrupt' with ablation = 'resampled'"):
        in_place(walker, groups, one, "clean", ablation="resampled")
    crossed = [(groups[0][0], groups[1][1])]
    with pytest.raises(Invalid, match="reference = 'clean': prompts of 17 tokens beside prompts of 13"):
        in_place(walker, crossed, [Node(0, 0, "last")], "clean")
