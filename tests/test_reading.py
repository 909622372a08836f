"""Attention between semantic positions, against Hugging Face's own and on planted heads."""

import pytest
import torch

from stages.circuits.reading import mean_attention
from tests.oracles import FAMILIES, float64_softmax, random_model, random_pairs, walker_of
from tests.planted import PLANS, planted_patcher


@pytest.mark.parametrize("kind", FAMILIES)
def test_attention_is_that_of_the_model(kind):
    model, pairs = random_model(kind), random_pairs()
    found = mean_attention(walker_of(model), pairs.clean_ids, pairs.positions, 0.01)
    with torch.no_grad(), float64_softmax():
        attentions = model(input_ids=pairs.clean_ids, output_attentions=True).attentions
    worst, rows = 0.0, torch.arange(len(pairs.clean_ids))
    for i, reader in enumerate(found.names):
        for j, source in enumerate(found.names):
            for layer, weights in enumerate(attentions):  # n h t t
                expected = weights[rows, :, pairs.positions[reader], pairs.positions[source]].mean(0)
                worst = max(worst, float((found.shares[i, layer, :, j] - expected).abs().max()))
    print(f"{kind}: largest error {worst:.1e}")
    assert worst < 1e-12 and found.names == tuple(sorted(pairs.positions))


def test_of_several_tokens_attention_from_them_is_a_mean_and_to_them_a_sum():
    model, pairs = random_model("llama_gqa"), random_pairs()
    at = {"end": pairs.positions["last"], "name": pairs.positions["earlier"][:, None] + torch.arange(3)}
    single = {"end": at["end"], **{f"name{i}": at["name"][:, i] for i in range(3)}}
    walker = walker_of(model)
    found = mean_attention(walker, pairs.clean_ids, at, 64.0).shares
    alone = mean_attention(walker, pairs.clean_ids, single, 64.0).shares
    expected = torch.stack([alone[0], alone[1:].mean(0)])
    expected = torch.stack([expected[..., 0], expected[..., 1:].sum(-1)], -1)
    print(f"largest error {float((found - expected).abs().max()):.1e}")
    assert torch.allclose(found, expected, atol=1e-12) and float(found[0, ..., 1].max()) > 0.05


def test_more_positions_than_dimensions_of_a_head():
    model, pairs = random_model("llama"), random_pairs()
    positions = {f"p{at:02}": torch.full((5,), at) for at in range(11)}
    found = mean_attention(walker_of(model), pairs.clean_ids, positions, 64.0)
    assert torch.allclose(found.shares.sum(-1), torch.ones(11, 3, 4, dtype=torch.float64))  # every position is named
    assert float(found.shares[0, :, :, 1:].abs().max()) == 0  # the first token sees itself only


def test_planted_heads_read_what_they_were_made_to_read():
    patcher = planted_patcher(PLANS["paper"])
    found = mean_attention(patcher.walker, patcher.pairs.clean_ids, patcher.pairs.positions, 64.0)
    wanted = {
        ("last", 3, 1): "earlier_object",
        ("last", 2, 3): "query_label",
        ("query_label", 1, 0): "earlier_label",
        ("earlier_label", 0, 2): "earlier_object",
    }
    for (position, layer, head), source in wanted.items():
        name, share = found.most_read(position, [(layer, head)])
        print(f"{layer}.{head} at {position} reads {name} with {share:.3f}")
        assert name == source and share > 0.95
