"""Estimates of effects: right to first order in every family, bounded in memory, and good enough for the search that
uses them to find the same circuits (for planted ones see test_selection)."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from stages.circuits.circuit import Component
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.spread import SpreadPatcher
from tests.oracles import FAMILIES, random_model, random_pairs, walker_of
from tests.test_path_patching import difference, spanning_pairs

RECEIVERS = [
    Receivers(Component.Q, ((2, 0), (2, 3), (1, 1))),
    Receivers(Component.K, ((1, 1), (2, 2))),
    Receivers(Component.V, ((1, 0), (2, 3), (2, 2))),
    Receivers(Component.V, ((0, 1), (2, 1))),
]
SMALL = 1e-5


def nearly_corrupt(model, pairs: AlignedPairs) -> AlignedPairs:
    """The pairs with corrupt prompts that differ little: their tokens are new ones, nearly those of the clean prompts.

    Tied heads are parted, so that the tokens that the measure reads stay as they are."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    half = vocabulary // 2
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        weight = model.get_input_embeddings().weight
        weight[half : 2 * half] = weight[:half] + SMALL * (weight[half : 2 * half] - weight[:half])
    clean = pairs.clean_ids % half
    return replace(pairs, clean_ids=clean, corrupt_ids=clean + half, corrupt_positions=pairs.positions)


CASES = [(kind, position) for kind in FAMILIES for position in ("last", "earlier")]
CASES += [(kind, position) for kind in ("llama_gqa", "gemma2", "gpt_neox") for position in ("span", "ending")]


@pytest.mark.parametrize(("kind", "position"), CASES)
def test_estimates_are_the_effects_of_small_changes(kind, position):
    model = random_model(kind)
    pairs = random_pairs()
    pairs = nearly_corrupt(model, pairs if position in pairs.positions else spanning_pairs())
    patcher = PathPatcher(walker_of(model), pairs, difference, 64.0)
    both = patcher.head_effects(position, RECEIVERS), patcher.estimates(position, RECEIVERS)
    for receivers, effects, estimates in zip(RECEIVERS, *both, strict=True):
        largest = float(effects.abs().max())
        error = float((estimates - effects).abs().max()) / largest
        print(f"{kind} {position} -> {receivers}: largest effect {largest:.1e}, error {error:.1e} of it")
        assert 1e-11 < largest < 1e-2 and error <= 1e-3


def test_estimates_on_the_logits_are_the_effects():
    patcher = PathPatcher(walker_of(random_model("llama_gqa")), random_pairs(), difference, 64.0)
    estimates, effects = patcher.estimates("last", [Receivers()])[0], patcher.head_effects("last", [Receivers()])[0]
    assert torch.equal(estimates, effects) and float(effects.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2"])
def test_estimates_in_half_precision_are_no_less_exact_than_effects(kind):
    half: Any = torch.nn.Module.to(random_model(kind), torch.bfloat16)
    models: list[Any] = [half, torch.nn.Module.to(deepcopy(half), torch.float32)]
    patchers = [PathPatcher(walker_of(model), random_pairs(), difference, 64.0) for model in models]
    estimates = zip(*(patcher.estimates("earlier", RECEIVERS) for patcher in patchers), strict=True)
    effects = zip(*(patcher.head_effects("earlier", RECEIVERS) for patcher in patchers), strict=True)
    for receivers, ours, exact in zip(RECEIVERS, estimates, effects, strict=True):
        errors = [float((low - high).square().mean().sqrt() / high.abs().max()) for low, high in (ours, exact)]
        print(f"{kind} -> {receivers}: errors of estimates and effects {errors}, as shares of the largest")
        assert ours[0].dtype == torch.float32 and errors[0] <= errors[1]


def test_estimates_do_not_depend_on_memory_or_processes():
    model, pairs = random_model("gemma3"), random_pairs(n=7)
    walker = walker_of(model)
    whole = PathPatcher(walker, pairs, difference, 256.0).estimates("earlier", RECEIVERS)
    few = PathPatcher(walker, pairs, difference, 0.01).estimates("earlier", RECEIVERS)
    spread = SpreadPatcher(walker, pairs, lambda rows: PathPatcher(walker, pairs.select(rows), difference, 64.0), 2)
    for expected, *others in zip(whole, few, spread.estimates("earlier", RECEIVERS), strict=True):
        error = max(float((expected - other).abs().max()) for other in others)
        print(f"max error {error:.1e} of {float(expected.abs().max()):.1e}")
        assert error <= 1e-12 < float(expected.abs().max())
