"""Similarity, overlap and change of edges, CKA and relearning, against slow definitions and planted cases."""

from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher
from stages.circuits.scores import Metric, measure_of
from stages.circuits.search import search
from stages.circuits.walker import Walker
from stages.measures.alignment import hsic, last_streams, linear_cka
from stages.measures.edge_scores import EdgeScores
from stages.measures.edges import edge_changes
from stages.measures.overlap import overlap_at, overlaps, strengths
from stages.measures.relearning import relearn, whole_scores
from stages.measures.retracing import retrace
from stages.measures.similarity import KINDS, floor, similarity
from stages.tasks.examples import Examples
from tests.test_search import RULE, counting_examples, counting_model, counting_patcher

LAYERS, HEADS = 3, 4
HOPS = (
    {"name": "answer", "position": "last", "component": None, "feeds": []},
    {"name": "q_last", "position": "last", "component": "q", "feeds": [[2, 1], [1, 0]]},
    {"name": "v_label", "position": "label", "component": "v", "feeds": [[1, 3]]},
)


def effects(true: np.ndarray, noise: float, seed: int) -> EdgeScores:
    """Scores [hops layers h] with independent noise on each half; 0 where nothing is live."""
    halves = true + noise * np.random.default_rng(seed).normal(size=(2, *true.shape))
    live = np.ones(true.shape, dtype=bool)
    live[1, 2:], live[2, 1:] = False, False
    halves = halves * live
    arrays = {f"{hop['name']}.half{half}": halves[half, i] for half in (0, 1) for i, hop in enumerate(HOPS)}
    found = EdgeScores.of(HOPS, arrays)
    assert found is not None and np.array_equal(found.live, live)
    return found


def truth(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(HOPS), LAYERS, HEADS)) ** 3


def test_edges_are_those_of_heads_below_the_highest_receiver() -> None:
    assert effects(truth(0), 0.1, 1).edges().shape == (2, 12 + 8 + 4)
    assert effects(truth(0), 0.1, 1).edges("v_label").shape == (2, 4)
    assert EdgeScores.of(HOPS, {}) is None


def test_similarity_reaches_its_ceiling_for_equal_circuits_and_the_null_for_renamed_heads() -> None:
    """Two models with the same true effects: value = ceiling on average, whatever their noise."""
    gaps = []
    for draw in range(30):
        base, tuned = effects(truth(draw), 0.3, 1000 + draw), effects(truth(draw), 0.9, 2000 + draw)
        entry = similarity(base, tuned, 2, [draw])["together"]["pearson"]
        gaps.append(entry["value"] - entry["ceiling"])
        assert entry["ceiling_tuned"] < entry["ceiling"] < entry["ceiling_base"]
    print(f"mean gap {np.mean(gaps):.3f}, maximum {np.max(np.abs(gaps)):.3f}")
    assert abs(np.mean(gaps)) < 0.03
    same = similarity(base, base, 2000, [0])["together"]
    for entry in same.values():
        assert entry["value"] == pytest.approx(entry["ceiling"]) and entry["null_high"] < entry["value"]
    renamed = EdgeScores(base.hops, base.positions, base.halves[..., [2, 0, 3, 1]], base.live)
    for kind, entry in similarity(base, renamed, 2000, [0])["together"].items():
        assert entry["value"] < same[kind]["value"] and entry["ceiling"] == pytest.approx(same[kind]["ceiling"])
        assert entry["null_mean"] == pytest.approx(same[kind]["null_mean"], abs=0.05)


@pytest.mark.parametrize("kind", list(KINDS))
def test_null_is_the_similarity_of_renamed_heads(kind: str) -> None:
    """The fast null against a loop that renames the heads and compares anew."""
    from stages.measures.similarity import crossed

    base, tuned = effects(truth(0), 0.1, 1), effects(truth(5), 0.1, 2)
    order = np.random.default_rng([3]).permuted(np.broadcast_to(np.arange(HEADS), (40, LAYERS, HEADS)), axis=-1)
    values = []
    for permutation in order:
        halves = np.stack([tuned.halves[:, :, layer, permutation[layer]] for layer in range(LAYERS)], axis=2)
        renamed = EdgeScores(tuned.hops, tuned.positions, halves, tuned.live)
        values.append(crossed(KINDS[kind][0], base.edges(), renamed.edges()))
    found = similarity(base, tuned, 40, [3])["together"][kind]
    error = max(abs(found["null_mean"] - np.mean(values)), abs(found["null_high"] - np.quantile(values, 0.95)))
    print(f"maximum error {error:.1e}")
    assert error < 1e-12


def test_floor_takes_the_hops_that_two_bases_share() -> None:
    base, other = effects(truth(0), 0.0, 1), effects(truth(1), 0.0, 2)
    fewer = EdgeScores(other.hops[1:], other.positions[1:], other.halves[:, 1:], other.live[1:])
    expected = np.corrcoef(base.halves[0, 1:][base.live[1:]], fewer.halves[1][fewer.live])[0, 1]
    found = floor(base, fewer)
    assert found is not None and found["pearson"] == pytest.approx(expected)
    assert floor(base, EdgeScores(("x",), ("last",), other.halves[:, :1], other.live[:1])) is None


def test_undefined_similarities_are_none() -> None:
    base = effects(truth(0), 0.1, 1)
    nothing = EdgeScores(base.hops, base.positions, 0 * base.halves, base.live)
    for entry in similarity(base, nothing, 5, [0])["together"].values():
        assert entry["value"] is None and entry["ceiling"] is None and entry["null_mean"] is None
    assert edge_changes(nothing, base, 0.5)["together"]["change"] is None


def test_overlap_and_its_chance_by_enumeration() -> None:
    """All pairs of sets of 3 of 6 nodes in two layers; and those with the same number in each layer."""
    strata, k = np.array([0, 0, 0, 0, 1, 1]), 3
    one, other = np.array([9.0, 8, 1, 2, 7, 0.5]), np.array([9.0, 1, 8, 2, 0.5, 7])
    found = overlap_at(one, other, strata, k)
    sets = [set(chosen) for chosen in combinations(range(6), k)]
    layered = [nodes for nodes in sets if len(nodes & {4, 5}) == 1]
    expected = {"share": 1 / 3, "jaccard": 1 / 5}
    for name, pool in (("chance", sets), ("layered", layered)):
        pairs = [(a, b) for a in pool for b in pool]
        expected[name] = float(np.mean([len(a & b) / k for a, b in pairs]))
        expected[f"{name}_jaccard"] = float(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
    expected["corrected"] = (1 / 3 - expected["layered"]) / (1 - expected["layered"])
    error = max(abs((found[name] or 0.0) - expected[name]) for name in expected)
    print(f"maximum error {error:.1e}")
    assert set(found) == set(expected) and error < 1e-12
    assert expected["layered"] == pytest.approx((2 * 2 / 4 + 1 * 1 / 2) / k)
    same = overlap_at(one, one, strata, k)
    assert same["share"] == same["jaccard"] == same["corrected"] == 1.0
    assert overlap_at(one, other, strata, 6)["corrected"] is None


def test_nodes_without_effect_are_not_among_the_strongest() -> None:
    """One node of each model does anything, and it is another one: ties of zeros must not look like agreement."""
    strata, one, other, nothing = np.array([0, 0, 0, 1, 1]), np.zeros(5), np.zeros(5), np.zeros(5)
    one[1], other[4] = 1.0, 1.0
    for k in (1, 2, 4):
        found = overlap_at(one, other, strata, k)
        assert found["share"] == found["jaccard"] == 0.0 and found["chance"] == pytest.approx(1 / 5)
        assert found["layered"] == 0.0 == found["corrected"]
        assert overlap_at(one, one, strata, k)["share"] == 1.0
        assert set(overlap_at(nothing, nothing, strata, k).values()) == {None}
        assert overlap_at(one, nothing, strata, k)["share"] == 0.0
    one[0] = other[0] = 0.5  # two each, one in common; random sets of 2 of 5 share 2 * 2 / 5 of 2
    found = overlap_at(one, other, strata, 4)
    pools = [[set(nodes) for nodes in combinations(range(5), 2)]] * 2
    expected = float(np.mean([len(a & b) / 2 for a in pools[0] for b in pools[1]]))
    print(f"maximum error {abs((found['chance'] or 0) - expected):.1e}")
    assert found["share"] == 1 / 2 and found["jaccard"] == 1 / 3 and found["chance"] == pytest.approx(expected)
    fewer = overlap_at(np.array([3.0, 2, 1, 0, 0]), np.array([3.0, 0, 0, 0, 0]), strata, 3)
    assert fewer["share"] == 1 / 3 and fewer["chance"] == pytest.approx(3 * 1 / 5 / 3)


def test_overlap_curve_of_equal_and_of_unrelated_circuits() -> None:
    base = effects(truth(0), 0.0, 1)
    found = overlaps(base, base, 5)
    assert found["nodes"] == 12 + 4 and found["sizes"][0] == 1 and found["at_circuit"]["size"] == 5
    assert found["observed"]["share"] == found["ceiling"]["share"] == [1.0] * len(found["sizes"])
    values, _ = strengths(base)
    assert values[0, 0] == max(abs(base.halves[0, 0, 0, 0]), abs(base.halves[0, 1, 0, 0]))
    corrected = []
    for draw in range(1, 200):
        other, strata = strengths(effects(truth(draw), 0.0, draw))
        corrected.append(overlap_at(values[0], other[1], strata, 5)["corrected"])
    print(f"unrelated: {np.mean(corrected):.3f}")
    assert abs(np.mean(corrected)) < 0.05


def test_change_of_edges_leaves_noise_out() -> None:
    true, after = truth(0), 1.5 * truth(0)
    raw, clean, still = [], [], []
    for draw in range(60):
        base, tuned = effects(true, 0.6, 1000 + draw), effects(after, 0.6, 2000 + draw)
        entry = edge_changes(base, tuned, 0.5)["together"]
        raw.append(entry["change_raw"])
        clean.append(entry["change"])
        still.append(edge_changes(base, effects(true, 0.6, 3000 + draw), 0.5)["together"]["change"])
    print(f"true 0.5: {np.mean(clean):.3f} without noise, {np.mean(raw):.3f} with; true 0: {np.mean(still):.3f}")
    assert abs(np.mean(clean) - 0.5) < 0.02 < np.mean(raw) - 0.5 and np.mean(still) < 0.1


def test_counts_of_strong_edges_by_hand() -> None:
    true, after = np.zeros((len(HOPS), LAYERS, HEADS)), np.zeros((len(HOPS), LAYERS, HEADS))
    true[0, 0], after[0, 0] = [1.0, 1.0, -1.0, 1.0], [1.0, 0.4, 1.0, 1.2]
    after[0, 1, 0] = 2.0
    entry = edge_changes(effects(true, 0, 0), effects(after, 0, 0), 0.5)["together"]
    assert entry["strong"] == 4 and entry["flipped"] == 0.25 and entry["weakened"] == 0.25
    assert entry["new"] == pytest.approx(2 / 4)  # the flipped one, and the one that did nothing
    assert entry["flipped_noise"] == entry["weakened_noise"] == entry["new_noise"] == 0
    assert entry["change"] == entry["change_raw"] == pytest.approx(sqrt(0.6**2 + 2**2 + 0.2**2 + 2**2) / 2)


def test_retracing_the_base_gives_its_own_scores() -> None:
    patcher = counting_patcher()
    _, hops = search(patcher, Metric.LOGIT_DIFFERENCE, RULE, lambda hop: None, "last")
    listed = [
        {"name": hop.name, "position": hop.position, "component": hop.component, "feeds": [list(f) for f in hop.feeds]}
        for hop in hops
    ]
    scored = [hop.name for hop in hops if hop.halves is not None]
    arrays, joint = retrace(patcher, Metric.LOGIT_DIFFERENCE, listed, scored)
    assert len(scored) >= 3 and set(joint) == {hop.name for hop in hops}
    error = 0.0
    for hop in hops:
        error = max(error, abs(joint[hop.name] - float(hop.joint.score)))
        if hop.halves is not None:
            both = np.stack([arrays[f"{hop.name}.half{half}"] for half in (0, 1)])
            error = max(error, float(np.abs(both - hop.halves.numpy()).max()))
    print(f"maximum error {error:.1e}")
    assert error < 1e-6


def test_retracing_sees_the_head_that_was_taken_out() -> None:
    examples, model = counting_examples(), counting_model()
    attention: Any = model.model.layers[0].self_attn
    with torch.no_grad():  # head 0.0 fed the values of head 1.0; now head 0.2 does in its place
        weight = attention.o_proj.weight
        weight[8:16, 16:24], weight[8:16, 0:8] = weight[8:16, 0:8].clone(), 0.0
    patcher = PathPatcher(
        Walker(model),
        AlignedPairs(examples.input_ids, examples.corrupt_ids, examples.positions, examples.corrupt_positions),
        measure_of(Metric.LOGIT_DIFFERENCE, examples.answer, examples.others),
        64.0,
    )
    hop = {"name": "v_last", "position": "last", "component": "v", "feeds": [[1, 0]]}
    arrays, _ = retrace(patcher, Metric.LOGIT_DIFFERENCE, [hop], ["v_last"])
    first = np.abs(arrays["v_last.half0"])
    print(f"head 0.0: {first[0, 0]:.1e}, head 0.2: {first[0, 2]:.3f}")
    assert first.argmax() == 2 and first[0, 0] < 1e-6


def gram_hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """Song et al. 2012, equation 5, as it stands there."""
    n, kernels = len(x), []
    for features in (x, y):
        kernel = features @ features.T
        kernels.append(kernel - torch.diag(kernel.diag()))
    k, m = kernels
    one = torch.ones(n, dtype=x.dtype)
    value = (
        torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
    )
    return float(value / (n * (n - 3)))


def test_cka_is_its_definition_on_gram_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 7, generator=generator, dtype=torch.float64) + 3
    y = x[:, :4] ** 2 + torch.randn(30, 4, generator=generator, dtype=torch.float64)
    expected = gram_hsic(x, y) / sqrt(gram_hsic(x, x) * gram_hsic(y, y))
    found = linear_cka(x, y)
    assert found is not None
    errors = abs(found - expected), abs(hsic(x, y) - gram_hsic(x, y)) / abs(gram_hsic(x, y))
    print(f"maximum error {max(errors):.1e}")
    assert max(errors) < 1e-12


def test_cka_knows_no_rotation_scale_or_offset_and_is_0_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    assert linear_cka(x, 2 * x @ rotation + 5) == pytest.approx(1, abs=1e-5)
    chance = [linear_cka(x, torch.randn(200, 16, generator=generator)) for _ in range(50)]
    print(f"unrelated: {np.mean([value or 0 for value in chance]):.4f}")
    assert abs(np.mean([value or 0 for value in chance])) < 0.01
    assert linear_cka(x, torch.ones(200, 3)) is None and linear_cka(x[:3], x[:3]) is None


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=4, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_streams_are_those_of_the_model() -> None:
    model, ids = tiny_model(0), torch.randint(12, (5, 6), generator=torch.Generator().manual_seed(0))
    streams = last_streams(Walker(model), ids, batch=2)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        error = float((streams[0] - hidden[1][:, -1]).abs().max())
        error = max(error, float((model.model.norm(streams[1]) - hidden[2][:, -1]).abs().max()))
    print(f"maximum error {error:.1e}")
    assert streams.shape == (2, 5, 16) and error < 1e-5


def copying_examples(n: int, seed: int) -> Examples:
    """The answer is the last token."""
    ids = torch.randint(12, (n, 5), generator=torch.Generator().manual_seed(seed))
    last = torch.full((n,), 4)
    return Examples(
        ids, ids[:, -1], (ids[:, -1:] + 1) % 12, {"last": last}, {"last": last[:, None]}, ids, {"last": last}
    )


def test_relearning_counts_steps_and_leaves_the_model_alone() -> None:
    model, examples, probe = tiny_model(0), copying_examples(64, 0), copying_examples(48, 1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings: dict[str, Any] = {"most_steps": 60, "learning_rate": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.0}
    once: dict[str, Any] = settings | {"most_steps": 1}
    found = relearn(model, examples, probe, 0.5, **settings)
    assert found.steps is not None and 0 < found.steps < 60 and len(found.accuracies) == found.steps + 1
    assert found.accuracies[-1] >= 0.5 > max(found.accuracies[:-1])
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    start = whole_scores(model, probe)
    assert found.before == start and found.before["accuracy"] == found.accuracies[0]
    assert found.after["accuracy"] == found.accuracies[-1] and found.after["p_correct"] > start["p_correct"]
    with torch.no_grad():
        logits = model(probe.input_ids).logits[:, -1].double()
    own, other = (logits[torch.arange(48), ids] for ids in (probe.answer, probe.others[:, 0]))
    expected = {
        "accuracy": (logits.argmax(1) == probe.answer).double().mean().item(),
        "candidate_accuracy": (own > other).double().mean().item(),
        "logit_difference": (own - other).mean().item(),
        "p_correct": logits.softmax(1)[torch.arange(48), probe.answer].mean().item(),
    }
    print(f"scores: maximum error {max(abs(start[name] - value) for name, value in expected.items()):.1e}")
    assert start == pytest.approx(expected, abs=1e-6)
    assert relearn(model, examples, probe, start["accuracy"], **settings).steps == 0
    short = relearn(model, examples, probe, 0.5, **once)
    assert short.steps is None and len(short.accuracies) == 2
