"""Position-local path patching against two whole hooked forward passes per sender, in float64."""

from dataclasses import replace

import pytest
import torch

from stages.circuits.circuit import Component
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher, Progress, Receivers
from stages.circuits.spread import SpreadPatcher
from stages.pipeline.stage import Invalid
from tests.oracles import FAMILIES, head_outputs, naive_path_patching, random_model, random_pairs, walker_of

RECEIVERS = {
    "logits": Receivers(),
    "q": Receivers(Component.Q, ((2, 0), (2, 3), (1, 1))),
    "k": Receivers(Component.K, ((1, 1), (2, 2))),
    "v": Receivers(Component.V, ((1, 0), (2, 3), (2, 2))),
}


def difference(logits, index):
    return logits[..., 3] - logits[..., 4:8].mean(-1)


def patcher_of(model, pairs: AlignedPairs, memory_mib: float = 64.0) -> PathPatcher:
    return PathPatcher(walker_of(model), pairs, difference, memory_mib)


CASES = [(kind, position) for kind in FAMILIES for position in ("last", "earlier")]
CASES += [(kind, "query_label") for kind in ("llama_gqa", "gemma2", "gpt_neox")]


@pytest.mark.parametrize(("kind", "position"), CASES)
def test_single_heads_equal_the_naive_version(kind, position):
    model, pairs = random_model(kind), random_pairs()
    patcher = patcher_of(model, pairs)
    outputs = head_outputs(model, pairs.clean_ids), head_outputs(model, pairs.corrupt_ids)
    together = patcher.head_effects(position, list(RECEIVERS.values()))
    for (name, receivers), effects in zip(RECEIVERS.items(), together, strict=True):
        error = largest = 0.0
        for layer in range(3):
            for head in range(4) if position == "last" else (0, 3):
                naive = naive_path_patching(model, pairs, position, [(layer, head)], receivers, *outputs)
                expected = difference(naive, None) - patcher.clean
                error = max(error, float((effects[layer, head] - expected).abs().max()))
                largest = max(largest, float(expected.abs().max()))
        print(f"{kind} {position} -> {name}: max error {error:.1e}, max effect {largest:.1e}")
        assert error <= 1e-11
        assert largest > 1e-3 or (name == "logits" and position != "last")


@pytest.mark.parametrize("name", RECEIVERS)
def test_sets_of_senders_equal_the_naive_version(name):
    model, pairs = random_model("llama_gqa", seed=1), random_pairs(1)
    patcher = patcher_of(model, pairs)
    outputs = head_outputs(model, pairs.clean_ids), head_outputs(model, pairs.corrupt_ids)
    sets = [
        [(1, 2), (0, 1), (0, 3)],
        [],
        [(layer, head) for layer in range(3) for head in range(4)],
        [(1, 0)],
    ]
    senders = torch.zeros(len(sets), 3, 4, dtype=torch.bool)
    for row, heads in enumerate(sets):
        for head in heads:
            senders[row][head] = True
    for position in ("last", "earlier"):
        effects = patcher.effects(position, senders, [RECEIVERS[name]])[0]
        naive = [naive_path_patching(model, pairs, position, heads, RECEIVERS[name], *outputs) for heads in sets]
        expected = torch.stack([difference(logits, None) - patcher.clean for logits in naive])
        error = float((effects - expected).abs().max())
        print(f"{position} -> {name}: max error {error:.1e}, effects {expected.abs().amax(1).tolist()}")
        assert error <= 1e-11
        joint = patcher.joint_effects(position, [RECEIVERS[name]])[0]
        assert float((effects[2] - joint).abs().max()) <= 1e-12


def spanning_pairs() -> AlignedPairs:
    """Positions of several tokens, in prompts whose corrupt partners are longer."""
    pairs, longer = random_pairs(2, length=11), random_pairs(3, length=14)
    at = torch.tensor([[2, 3, 5], [1, 4, 5], [4, 5, 6], [2, 4, 10], [3, 3, 7]])  # one reaches the end, one repeats
    corrupt_at = torch.tensor([[4, 5, 6], [0, 9, 3], [13, 2, 1], [7, 8, 13], [5, 5, 6]])
    ending, corrupt_ending = torch.tensor([[8, 10]] * 5), torch.tensor([[11, 13]] * 5)
    return AlignedPairs(
        pairs.clean_ids,
        longer.corrupt_ids,
        {"span": at, "ending": ending, "last": ending[:, 1]},
        {"span": corrupt_at, "ending": corrupt_ending, "last": corrupt_ending[:, 1]},
    )


@pytest.mark.parametrize("memory", [64.0, 0.05])
@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2", "gpt_neox", "gpt2"])
def test_spans_equal_the_naive_version(kind, memory):
    model, pairs = random_model(kind), spanning_pairs()
    patcher = patcher_of(model, pairs, memory)
    outputs = head_outputs(model, pairs.clean_ids), head_outputs(model, pairs.corrupt_ids)
    sets = [[(0, 1)], [(1, 3), (0, 0)], [(2, 2)], [(layer, head) for layer in range(3) for head in range(4)]]
    senders = torch.zeros(len(sets), 3, 4, dtype=torch.bool)
    for row, heads in enumerate(sets):
        for head in heads:
            senders[row][head] = True
    for position in pairs.positions:
        found = patcher.effects(position, senders, list(RECEIVERS.values()))
        for (name, receivers), effects in zip(RECEIVERS.items(), found, strict=True):
            naive = [naive_path_patching(model, pairs, position, heads, receivers, *outputs) for heads in sets]
            expected = torch.stack([difference(logits, None) - patcher.clean for logits in naive])
            error = float((effects - expected).abs().max())
            print(f"{kind} {position} -> {name}: max error {error:.1e}, effects {expected.abs().amax(1).tolist()}")
            assert error <= 1e-11
            assert float(expected.abs().max()) > 1e-3
            if name == "logits" and position == "span":
                reach = [False, False, False, True, False]
                assert effects.any(0).tolist() == reach and expected.abs().gt(1e-12).any(0).tolist() == reach


def test_memory_limit_changes_nothing_but_rounding():
    model, pairs = random_model("qwen2"), random_pairs()
    wide, narrow = patcher_of(model, pairs), patcher_of(model, pairs, memory_mib=0.001)
    assert not narrow._chains and wide._chains
    for ours, other in zip(
        wide.head_effects("earlier", list(RECEIVERS.values())),
        narrow.head_effects("earlier", list(RECEIVERS.values())),
        strict=True,
    ):
        assert float((ours - other).abs().max()) <= 1e-12


def test_shares_of_the_examples_in_processes_change_nothing_but_rounding():
    model, pairs = random_model("qwen2"), random_pairs(n=9)
    walker = walker_of(model)

    def share(rows: slice) -> PathPatcher:
        part = AlignedPairs(
            pairs.clean_ids[rows],
            pairs.corrupt_ids[rows],
            {name: at[rows] for name, at in pairs.positions.items()},
            {name: at[rows] for name, at in pairs.corrupt_positions.items()},
        )
        return PathPatcher(walker, part, difference, 64.0)

    whole, spread = patcher_of(model, pairs), SpreadPatcher(walker, pairs, share, 2)
    for name in ("clean", "corrupt"):
        assert float((getattr(whole, name) - getattr(spread, name)).abs().max()) <= 1e-12
    for position in pairs.positions:
        for ours, other in zip(
            whole.head_effects(position, list(RECEIVERS.values())),
            spread.head_effects(position, list(RECEIVERS.values())),
            strict=True,
        ):
            assert ours.shape == other.shape
            assert float((ours - other).abs().max()) <= 1e-12
    with pytest.raises(Invalid, match="nowhere"):
        spread.effects("nowhere", torch.ones(1, 3, 4, dtype=torch.bool), [Receivers()])


def test_a_clean_partner_has_no_effect():
    pairs = random_pairs()
    same = replace(pairs, corrupt_ids=pairs.clean_ids, corrupt_positions=pairs.positions)
    patcher = patcher_of(random_model("llama"), same)
    for position in pairs.positions:
        for effects in patcher.head_effects(position, list(RECEIVERS.values())):
            print(float(effects.abs().max()))
            assert float(effects.abs().max()) <= 1e-13  # matrices of other shapes round differently


def test_heads_at_or_above_the_highest_receiver_have_exactly_no_effect():
    patcher = patcher_of(random_model("llama"), random_pairs())
    receivers = [Receivers(part, heads) for part in Component for heads in (((1, 0),), ((1, 2), (2, 3)), ((0, 1),))]
    for position in ("last", "earlier"):
        for receiver, effects in zip(receivers, patcher.head_effects(position, receivers), strict=True):
            top = max(layer for layer, _ in receiver.heads)
            assert torch.count_nonzero(effects[top:]) == 0
            assert top == 0 or torch.count_nonzero(effects[:top]) > 0
    assert torch.count_nonzero(patcher.head_effects("earlier", [Receivers()])[0]) == 0  # frozen heads carry nothing on


def test_the_corrupt_last_token_with_all_its_heads_is_the_corrupt_run():
    # prompts that end in the same token differ at the last position by head outputs only
    pairs = random_pairs()
    corrupt = pairs.corrupt_ids.clone()
    corrupt[:, -1] = pairs.clean_ids[:, -1]
    patcher = patcher_of(random_model("qwen2"), replace(pairs, corrupt_ids=corrupt))
    effect = patcher.joint_effects("last", [Receivers()])[0]
    error = float((effect - (patcher.corrupt - patcher.clean)).abs().max())
    print(error, float(effect.abs().max()))
    assert float(effect.abs().max()) > 1e-2
    assert error <= 1e-12


@pytest.mark.parametrize("memory", [64.0, 0.01])
def test_progress_ends_with_all_senders_and_names_the_strongest(memory: float) -> None:
    patcher = patcher_of(random_model("llama"), random_pairs(), memory)
    told: list[Progress] = []
    patcher.watch = told.append
    receivers = [Receivers(Component.Q, ((2, 0), (2, 1)))]
    effects = patcher.head_effects("last", receivers)[0].mean(-1)
    assert [entry.done for entry in told] == sorted(entry.done for entry in told)
    # only two layers are below the receivers, but a sweep that is kept for further questions has all of them
    assert told[-1].done == told[-1].total == (12 if memory == 64.0 else 8)
    layer, head = divmod(int(effects.abs().argmax()), effects.shape[1])
    assert told[-1].strongest == f"{layer}.{head}"
    assert told[-1].effect == pytest.approx(float(effects[layer, head]))
