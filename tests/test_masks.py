"""DCM against whole hooked passes, finite differences, and groups whose content is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.circuits.circuit import Group, Node
from stages.circuits.desiderata_pairs import PairTable
from stages.circuits.exchange import Sites, Start, at_positions, layers_with, swap
from stages.circuits.mask_training import MaskSettings, Tails, mask_orders, nested_order, train_masks
from stages.circuits.masks import component_masks, fewest_enough
from stages.circuits.walker import Walker
from stages.tasks.examples import DesiderataPairs
from tests.oracles import FAMILIES, LENGTH, random_model, walker_of
from tests.oracles_ablation import naive_exchange, outputs_of, random_positions, random_prompts

SETTINGS = MaskSettings(
    steps=40,
    batch=16,
    learning_rate=0.1,
    start=0.5,
    sparsity=0.02,
    objective="log_probability",
    tolerance=0.0,
    memory_mib=64.0,
)
HEADS = ((0, 1), (2, 3), (1, 0), (1, 2))


def pairs(n: int, seed: int, target: torch.Tensor | None = None) -> DesiderataPairs:
    zeros = torch.zeros(n, dtype=torch.long)
    return DesiderataPairs(
        random_prompts(n, seed=seed),
        random_prompts(n, seed=seed + 1000),
        zeros if target is None else target,
        zeros,
        random_positions(n, seed=seed),
        random_positions(n, seed=seed + 1000),
    )


def swapped(walker: Walker, data: DesiderataPairs, position: str, weights: Tensor) -> Tensor:
    """Logits with the source's outputs at one position; weights [layers h] are shares of it."""
    run = walker.run(data.base_ids)
    z = walker.run(data.source_ids).z
    at = data.source_positions[position][:, None]
    given = [at_positions(layer, at) for layer in z]
    sites = Sites.tail(data.base_positions[position][:, None], LENGTH, torch.float64)
    weights = weights[None, None, :, None]
    layers = layers_with(weights.detach())
    start = Start.of(run, sites, min(layers, default=walker.n_layers))
    return swap(walker, start, sites, given.__getitem__, weights, layers)[:, 0]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("position", ["earlier_separator", "last"])
def test_partial_exchange_equals_whole_hooked_passes(kind: str, position: str) -> None:
    model = random_model(kind)
    walker = walker_of(model)
    data = pairs(6, 0)
    shares = {Node(*head, position): share for head, share in zip(HEADS, (0.3, 1.0, 0.8, 0.0), strict=True)}
    given = outputs_of(model, data.source_ids, data.source_positions, list(shares))
    naive = naive_exchange(model, data.base_ids, given, data.base_positions, shares)
    weights = torch.zeros(3, 4, dtype=torch.float64)
    for node, share in shares.items():
        weights[node.layer, node.head] = share
    with torch.no_grad():
        ours, clean = swapped(walker, data, position, weights), walker.run(data.base_ids).logits
        assert torch.equal(swapped(walker, data, position, torch.zeros_like(weights)), clean)
    error, effect = float((ours - naive).abs().max()), float((clean - naive).abs().max())
    print(f"{kind}, {position}: max error {error:.1e}, effect {effect:.1e}")
    assert error <= 1e-9
    assert effect > 1e-2


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradient_of_the_mask_equals_finite_differences(kind: str) -> None:
    model = random_model(kind).requires_grad_(False)
    walker = walker_of(model)
    data = pairs(6, 0)
    nodes = [Node(*head, "earlier_separator") for head in HEADS]
    given = outputs_of(model, data.source_ids, data.source_positions, nodes)
    share = torch.tensor([0.2, 0.5, 0.7, 0.4], dtype=torch.float64, requires_grad=True)
    weights = torch.zeros(3, 4, dtype=torch.float64).index_put(tuple(torch.tensor(HEADS).T), share)
    swapped(walker, data, "earlier_separator", weights)[:, 5].mean().backward()
    assert share.grad is not None
    for index in range(len(nodes)):
        values = []
        for step in (1e-5, -1e-5):
            moved = share.detach().clone()
            moved[index] += step
            shares = dict(zip(nodes, moved.tolist(), strict=True))
            values.append(naive_exchange(model, data.base_ids, given, data.base_positions, shares)[:, 5].mean())
        slope = float(values[0] - values[1]) / 2e-5
        print(f"{kind}, head {HEADS[index]}: {float(share.grad[index]):.6f} and {slope:.6f}")
        assert abs(float(share.grad[index]) - slope) <= 1e-6
        assert abs(slope) > 1e-5 or HEADS[index][0] == 2, "only the last layer may have no effect at this position"


def test_sources_of_unequal_lengths_give_what_each_gives_alone() -> None:
    """Shorter sources are lengthened behind their last position, where nothing earlier can see it."""
    walker = walker_of(random_model("llama"))
    short, long = pairs(5, 0), pairs(4, 1)
    short = replace(short, source_ids=short.source_ids[:, :9], source_positions={"last": torch.full((5,), 8)})
    table = PairTable.of([short, long], ["last"])
    both = table.source_outputs(walker, slice(None))["last"]
    for number, entry in enumerate((short, long)):
        alone = PairTable.of([entry], ["last"]).source_outputs(walker, slice(None))["last"]
        error = float((both[:, table.desideratum == number] - alone).abs().max())
        print(f"max error {error:.1e}")
        assert error <= 1e-12


def known(position: str, carriers: list[tuple[int, int]], n: int, seed: int) -> DesiderataPairs:
    """AlignedPairs whose target is what a model answers when exactly `carriers` are swapped."""
    walker = walker_of(random_model("llama"))
    data = pairs(n, seed)
    weights = torch.zeros(3, 4, dtype=torch.float64)
    weights[tuple(torch.tensor(carriers).T)] = 1
    with torch.no_grad():
        answers, clean = (
            swapped(walker, data, position, weights).argmax(-1),
            walker.run(data.base_ids).logits.argmax(-1),
        )
    return replace(data, target=answers).select(answers != clean)


def test_masks_find_the_heads_that_carry_the_target() -> None:
    walker = walker_of(random_model("llama"))
    heads = ((0, 0), (0, 3), (1, 1), (1, 2), (2, 0), (2, 2))
    wanted = {"first": [(0, 3), (2, 2)], "second": [(1, 1), (1, 2)]}
    splits = [
        {name: known("last", carriers, n, seed) for name, carriers in wanted.items()}
        for n, seed in ((100, 1), (60, 2), (80, 3))
    ]
    group = Group("g", "last", "logits", None, heads)
    found = component_masks(walker, splits[0], splits[1], splits[2], [group], SETTINGS, np.random.default_rng(0))
    for name, carriers in wanted.items():
        result = found["g", name]
        print(name, result)
        assert sorted(result.selected) == carriers
        assert result.accuracy == 1.0
        assert result.floor == 0.0
        assert result.all_heads_accuracy < 1.0
        assert result.random_accuracy < 0.7
        assert result.size == 6
        assert result.n_test == len(splits[2][name])
    again = component_masks(walker, splits[0], splits[1], splits[2], [group], SETTINGS, np.random.default_rng(0))
    assert again == found
    little = replace(SETTINGS, memory_mib=2.0)
    generator = np.random.default_rng(0)
    parts = component_masks(walker, splits[0], splits[1], splits[2], [group], little, generator, processes=2)
    assert parts == found, "neither the memory limit nor the number of processes changes a result"


def test_nothing_is_selected_where_nothing_is_carried() -> None:
    walker = walker_of(random_model("llama"))
    splits = []
    for n, seed in ((60, 1), (60, 2), (60, 3)):
        data = pairs(n, seed)
        with torch.no_grad():
            clean = walker.run(data.base_ids).logits.argmax(-1)
        splits.append({"unchanged": replace(data, target=clean)})  # swapping can only hurt
    groups = [
        Group("low", "earlier_label", "high", None, ((0, 1), (1, 1))),
        Group("high", "last", "logits", None, HEADS),
    ]
    found = component_masks(walker, splits[0], splits[1], splits[2], groups, SETTINGS, np.random.default_rng(0))
    for name in ("low", "high"):
        result = found[name, "unchanged"]
        assert result.selected == ()
        assert result.accuracy == result.floor == 1.0
        assert result.all_heads_accuracy < 1.0


def tails_of(walker: Walker, data: list[DesiderataPairs], group: Group, memory_mib: float = 64.0) -> Tails:
    table = PairTable.of(data, [group.position])
    return Tails(walker, table, [group], [torch.arange(len(table))], memory_mib)


def test_desiderata_of_one_batch_do_not_mix() -> None:
    walker = walker_of(random_model("llama").requires_grad_(False))
    group = Group("g", "last", "logits", None, HEADS)
    data = [known("last", [(2, 3)], 30, 1), known("last", [(1, 0)], 30, 2)]
    together, _ = train_masks(tails_of(walker, data, group), group, SETTINGS)
    for index, one in enumerate(data):
        mask, _ = train_masks(tails_of(walker, [one], group), group, SETTINGS)
        assert torch.allclose(mask[0], together[index], atol=1e-9)


def test_tails_that_are_made_again_give_the_same_masks() -> None:
    walker = walker_of(random_model("llama").requires_grad_(False))
    group = Group("g", "earlier_label", "logits", None, HEADS)
    much, little = (tails_of(walker, [pairs(20, 1)], group, memory) for memory in (64.0, 0.01))
    assert len(much._kept) == 2 and len(little._kept) == 0
    settings = replace(SETTINGS, steps=5)
    error = float((train_masks(much, group, settings)[0] - train_masks(little, group, settings)[0]).abs().max())
    print(f"max error {error:.1e}")
    assert error <= 1e-9


def test_training_leaves_the_model_as_it_was() -> None:
    model = random_model("llama")
    frozen = next(model.parameters()).requires_grad_(False)
    group = Group("g", "last", "logits", None, HEADS)
    mask_orders(walker_of(model), {"one": pairs(6, 0)}, [group], replace(SETTINGS, steps=1))
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert not frozen.requires_grad and all(parameter.grad is None for parameter in model.parameters())


def test_the_raw_logit_is_the_objective_of_the_paper() -> None:
    walker = walker_of(random_model("llama").requires_grad_(False))
    group = Group("g", "last", "logits", None, HEADS)
    tails = tails_of(walker, [known("last", [(2, 3)], 40, 1)], group)
    settings = replace(SETTINGS, objective="logit", steps=1, start=1.0)
    mask, _ = train_masks(tails, group, settings)
    logit, _ = train_masks(tails, group, replace(settings, sparsity=1e6))
    assert float(mask.min()) < 1, "some head raises the target's logit"
    assert torch.equal(logit, torch.ones(1, 4, dtype=torch.float64)), "a high price swaps nothing"


def test_ties_go_to_fewer_heads() -> None:
    assert fewest_enough([0.1, 0.8, 0.9, 0.9, 0.9], 0.0) == 2
    assert fewest_enough([0.1, 0.8, 0.9, 0.9, 0.91], 0.02) == 2
    assert fewest_enough([0.1, 0.1, 0.1], 0.0) == 0


def test_order_is_by_mask_and_then_by_how_early_it_closed() -> None:
    mask = torch.tensor([[0.0, 1.0, 0.0, 0.4]])
    mean = torch.tensor([[0.3, 0.9, 0.2, 0.1]])
    assert nested_order(mask, mean).tolist() == [[2, 0, 3, 1]]
