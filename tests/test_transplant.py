"""CMAP against whole hooked passes, and what must hold when a model is transplanted into itself."""

import copy

import numpy as np
import pytest
import torch
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.circuit import Node
from stages.circuits.exchange import Positions
from stages.circuits.transplant import random_like, read_at, transplant, transplant_inputs
from stages.cmap import heads_alone, patch_both_ways
from stages.measures.readout import Readout, reading
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


EXAMPLES = Examples(IDS, torch.arange(6), torch.tensor([[7, 8, 9]] * 6), AT, {}, IDS, AT)
SETS = {"group": [Node(1, 3, "last")], "circuit": sorted(random_circuit(3, 4, 0.3, 0))}
INPUTS = ("q", "k", "v")
DIRECTIONS = ("tuned_to_base", "base_to_tuned")


def test_both_ways() -> None:
    base = random_model("llama")
    walkers = walker_of(base), walker_of(tuned_from(base))

    def record(memory: float, processes: int) -> dict:
        generator = np.random.default_rng(0)
        return patch_both_ways(*walkers, EXAMPLES, SETS, 2, memory, generator, processes=processes, inputs=INPUTS)

    found, small = record(MEMORY, 1), record(1e-6, 2)
    assert set(found["tuned_to_base"]) == set(found["random"]["base_to_tuned"]) == set(SETS)
    for direction in DIRECTIONS:
        assert list(found["inputs"][direction]) == list(INPUTS)
        for name in SETS:
            for of, again in ((found, small), (found["random"], small["random"])):
                assert of[direction][name] == pytest.approx(again[direction][name], abs=1e-12)
            for of, again in zip(*(r["inputs"][direction].values() for r in (found, small)), strict=True):
                assert of[name] == pytest.approx(again[name], abs=1e-12)
    itself = patch_both_ways(walkers[0], walkers[0], EXAMPLES, SETS, 1, MEMORY, np.random.default_rng(0), inputs=INPUTS)
    for direction in DIRECTIONS:
        inputs = [entry for component in INPUTS for entry in itself["inputs"][direction][component].values()]
        for entry in [*itself[direction].values(), *itself["random"][direction].values(), *inputs]:
            assert entry == pytest.approx(itself["base"], abs=1e-9)
    changed = found["tuned_to_base"]["circuit"]["logit_difference"] - found["base"]["logit_difference"]
    assert abs(changed) > 1e-3


def test_heads_alone_equal_whole_hooked_passes() -> None:
    base = random_model("llama_gqa")
    tuned = tuned_from(base)
    ours, theirs, nodes = walker_of(base), walker_of(tuned), sorted(random_circuit(3, 4, 0.3, 0))
    found = heads_alone(ours, theirs, EXAMPLES, nodes, MEMORY)
    small = heads_alone(ours, theirs, EXAMPLES, nodes, 1e-6, processes=2)
    assert found["n"] == len(EXAMPLES) and len(found["alone"]) == len(nodes)
    assert {(*entry["head"], entry["position"]) for entry in found["alone"]} == {
        (node.layer, node.head, node.position) for node in nodes
    }
    read = reading(EXAMPLES.answer, EXAMPLES.others)

    def difference(logits: torch.Tensor) -> float:
        return Readout.join([read(logits[:, None], slice(0, len(EXAMPLES)))]).means()[0]["logit_difference"]

    ids, at = EXAMPLES.input_ids, EXAMPLES.positions
    whole = difference(ours.run(ids).logits)
    tuned_alone = difference(theirs.run(ids).logits)
    errors = []
    for entry, again in zip(found["alone"], small["alone"], strict=True):
        node = {Node(entry["head"][0], entry["head"][1], entry["position"])}
        damaged = naive_exchange(base, ids, outputs_of(tuned, ids, at, node), at, dict.fromkeys(node, 1.0))
        repaired = naive_exchange(tuned, ids, outputs_of(base, ids, at, node), at, dict.fromkeys(node, 1.0))
        errors.append(abs(entry["damage"] - (whole - difference(damaged)) / whole))
        errors.append(abs(entry["repair"] - (difference(repaired) - tuned_alone) / whole))
        assert again["damage"] == pytest.approx(entry["damage"], abs=1e-12)
    print(f"{len(nodes)} heads: max error {max(errors):.1e}")
    assert max(errors) <= 1e-9 < 1e-3 < max(abs(entry["damage"]) for entry in found["alone"])


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen2"])
def test_inputs_both_ways_equal_whole_hooked_passes(kind: str) -> None:
    """q at the nodes, k and v at every token; what is there beside them does not depend on them."""
    base = random_model(kind)
    tuned = tuned_from(base)
    call = (walker_of(base), walker_of(tuned), EXAMPLES, SETS, 1, MEMORY)
    found = patch_both_ways(*call, np.random.default_rng(0), inputs=INPUTS)
    every = {"every_token": torch.arange(IDS.shape[1]).expand(len(IDS), -1)}
    effects = dict.fromkeys(INPUTS, 0.0)
    for direction, donor, receiver, alone in (
        ("tuned_to_base", tuned, base, found["base"]),
        ("base_to_tuned", base, tuned, found["tuned"]),
    ):
        for component in INPUTS:
            for name, nodes in SETS.items():
                moved = nodes if component == "q" else [Node(node.layer, node.head, "every_token") for node in nodes]
                naive = naive_inputs(receiver, donor, IDS, AT | every, moved, component).detach()
                expected = Readout.of(naive[:, None], EXAMPLES.answer, EXAMPLES.others).means()[0]
                scores = found["inputs"][direction][component][name]
                assert scores == pytest.approx(expected, abs=1e-9)
                effect = abs(scores["logit_difference"] - alone["logit_difference"])
                effects[component] = max(effect, effects[component])
    print(f"{kind}: largest effects {effects}")
    assert min(effects.values()) > 1e-4
    without = patch_both_ways(*call, np.random.default_rng(0))
    assert without.pop("inputs") == {direction: {} for direction in DIRECTIONS}
    assert without == {key: value for key, value in found.items() if key != "inputs"}


@pytest.mark.parametrize("component", ["k", "v"])
def test_keys_and_values_of_every_token_are_all_that_heads_read_of_them(component: str) -> None:
    """Where two models differ in one projection alone, its transplant makes one into the other; at the nodes' own
    positions it does not."""
    base = random_model("llama")
    tuned = copy.deepcopy(base)
    weight = tuned.get_parameter(f"model.layers.1.self_attn.{component}_proj.weight")
    with torch.no_grad():
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    ours, theirs = walker_of(base), walker_of(tuned)
    clean, given = ours.run(IDS), theirs.run(IDS)
    nodes = [Node(1, head, "last") for head in range(4)]
    there, at = read_at(nodes, component, AT, *IDS.shape)
    everything = transplant_inputs(ours, clean, theirs, given, at, there, component, MEMORY)[:, 0]
    own = transplant_inputs(ours, clean, theirs, given, AT, nodes, component, MEMORY)[:, 0]
    error, left = (float((patched - given.logits).abs().max()) for patched in (everything, own))
    print(f"{component}: difference from the donor {error:.1e}, {left:.1e} at the nodes alone")
    assert error <= 1e-9 and left > 1e-3
