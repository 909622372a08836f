"""CMAP against whole hooked passes, and what must hold when a model is transplanted into itself."""

import copy

import numpy as np
import pytest
import torch
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.circuit import Node
from stages.circuits.exchange import Positions
from stages.circuits.transplant import random_like, transplant, transplant_inputs
from stages.cmap import patch_both_ways
from stages.pipeline.stage import Invalid
from stages.tasks.examples import Examples
from tests.oracles import FAMILIES, random_model, walker_of
from tests.oracles_ablation import (
    naive_exchange,
    naive_inputs,
    outputs_of,
    random_circuit,
    random_positions,
    random_prompts,
    several_positions,
)

MEMORY = 64.0
IDS, AT = random_prompts(), random_positions()


def tuned_from(model: PreTrainedModel) -> PreTrainedModel:
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return tuned


@pytest.mark.parametrize("at", [AT, several_positions()], ids=["one_index", "several"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_transplants_equal_whole_hooked_passes(kind: str, at: Positions) -> None:
    base = random_model(kind)
    tuned = tuned_from(base)
    for receiver, donor in ((base, tuned), (tuned, base)):
        ours, theirs = walker_of(receiver), walker_of(donor)
        clean, given = ours.run(IDS), theirs.run(IDS)
        for nodes in (random_circuit(3, 4, 0.3, 0), frozenset({Node(1, 3, "last"), Node(2, 0, "last")})):
            naive = naive_exchange(receiver, IDS, outputs_of(donor, IDS, at, nodes), at, dict.fromkeys(nodes, 1.0))
            patched = transplant(ours, clean, given, at, nodes, MEMORY)[:, 0]
            error, effect = (
                float((patched - naive).abs().max()),
                float((clean.logits - naive).detach().abs().max()),
            )
            print(f"{kind}, {len(nodes)} nodes: max error {error:.1e}, effect {effect:.1e}")
            assert error <= 1e-9
            assert effect > 1e-3


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("at", [AT, several_positions()], ids=["one_index", "several"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_transplanted_inputs_equal_whole_hooked_passes(kind: str, at: Positions, component: str) -> None:
    base = random_model(kind)
    tuned = tuned_from(base)
    ours, theirs = walker_of(base), walker_of(tuned)
    clean, given = ours.run(IDS), theirs.run(IDS)
    high = frozenset({Node(1, 3, "last"), Node(2, 0, "last"), Node(2, 1, "earlier_separator")})
    for nodes in (random_circuit(3, 4, 0.2, 0), high):
        naive = naive_inputs(base, tuned, IDS, at, nodes, component)
        for memory in (MEMORY, 1e-6):
            patched = transplant_inputs(ours, clean, theirs, given, at, nodes, component, memory)[:, 0]
            error, effect = float((patched - naive).abs().max()), float((clean.logits - naive).abs().max())
            print(f"{kind}, {component} of {len(nodes)} nodes: max error {error:.1e}, effect {effect:.1e}")
            assert error <= 1e-9 and effect > 1e-4


@pytest.mark.parametrize("component", ["q", "v"])
def test_random_controls_of_inputs_are_those_of_the_nodes_drawn(component: str) -> None:
    base = random_model("llama_gqa")
    ours, theirs = walker_of(base), walker_of(tuned_from(base))
    clean, given = ours.run(IDS), theirs.run(IDS)
    nodes = random_circuit(3, 4, 0.3, 0)
    names = sorted({node.position for node in nodes})
    random = random_like(nodes, len(IDS), 2, 3, 4, np.random.default_rng(0))
    found = transplant_inputs(ours, clean, theirs, given, AT, nodes, component, MEMORY, random)
    for row in range(len(IDS)):
        drawn = [Node(layer, head, names[site]) for layer, site, head in random[row, 1].nonzero().tolist()]
        alone = transplant_inputs(ours, clean, theirs, given, AT, drawn, component, MEMORY)[row, 0]
        assert float((found[row, 2] - alone).abs().max()) <= 1e-12
    with pytest.raises(Invalid, match="component 'z'"):
        transplant_inputs(ours, clean, theirs, given, AT, nodes, "z", MEMORY)


@pytest.mark.parametrize("at", [AT, several_positions()], ids=["one_index", "several"])
def test_random_controls_equal_whole_hooked_passes(at: Positions) -> None:
    base = random_model("llama")
    tuned = tuned_from(base)
    nodes = random_circuit(3, 4, 0.3, 0)
    random = random_like(nodes, 6, 2, 3, 4, np.random.default_rng(0))
    clean, given = walker_of(base).run(IDS), walker_of(tuned).run(IDS)
    patched = transplant(walker_of(base), clean, given, at, nodes, MEMORY, random)
    names = sorted({node.position for node in nodes})
    for row in range(6):
        one = {name: position[row : row + 1] for name, position in at.items()}
        for draw in range(2):
            drawn = [Node(layer, head, names[site]) for layer, site, head in random[row, draw].nonzero().tolist()]
            assert len(drawn) == len(nodes)
            given_one = outputs_of(tuned, IDS[row : row + 1], one, drawn)
            naive = naive_exchange(base, IDS[row : row + 1], given_one, one, dict.fromkeys(drawn, 1.0))
            assert float((patched[row, 1 + draw] - naive[0]).detach().abs().max()) <= 1e-9


def test_a_model_transplanted_into_itself_does_not_change() -> None:
    walker = walker_of(random_model("qwen2"))
    clean = walker.run(IDS)
    patched = transplant(walker, clean, walker.run(IDS), AT, random_circuit(3, 4, 0.5, 0), MEMORY)[:, 0]
    error = float((patched - clean.logits).detach().abs().max())
    print(f"identity: max error {error:.1e}")
    assert error <= 1e-12


def test_both_ways() -> None:
    base = random_model("llama")
    walkers = walker_of(base), walker_of(tuned_from(base))
    examples = Examples(IDS, torch.arange(6), torch.tensor([[7, 8, 9]] * 6), AT, {}, IDS, AT)
    sets = {"group": [Node(1, 3, "last")], "circuit": sorted(random_circuit(3, 4, 0.3, 0))}

    def record(memory: float) -> dict:
        return patch_both_ways(*walkers, examples, sets, 2, memory, np.random.default_rng(0))

    found, small = record(MEMORY), record(1e-6)
    assert set(found["tuned_to_base"]) == set(found["random"]["base_to_tuned"]) == {"group", "circuit"}
    for direction in ("tuned_to_base", "base_to_tuned"):
        for name in sets:
            for key, value in found[direction][name].items():
                assert value == pytest.approx(small[direction][name][key], abs=1e-12)
            assert found["random"][direction][name] == pytest.approx(small["random"][direction][name], abs=1e-12)
    itself = patch_both_ways(walkers[0], walkers[0], examples, sets, 1, MEMORY, np.random.default_rng(0))
    for direction in ("tuned_to_base", "base_to_tuned"):
        for entry in [*itself[direction].values(), *itself["random"][direction].values()]:
            assert entry == pytest.approx(itself["base"], abs=1e-9)
    changed = found["tuned_to_base"]["circuit"]["logit_difference"] - found["base"]["logit_difference"]
    assert abs(changed) > 1e-3
