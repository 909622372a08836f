"""The benchmark: its naive side against the oracle, its counts against formulas, and that it runs."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Component, Node
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.transplant import transplant
from stages.circuits.walker import Walker
from stages.measures.faithfulness import evaluate_circuits
from stages.measures.prompts import AnsweredPrompts
from tests.benchmark.__main__ import END, START, inserted, main
from tests.benchmark.cases import CASES, build_measure, build_model, build_pairs, hops
from tests.benchmark.measuring import RUNS, TokenLayers, memory
from tests.benchmark.naive import NaivePathPatcher
from tests.live_bytes import LiveBytes
from tests.oracles import float64_softmax, head_outputs, naive_path_patching, random_model, random_pairs

MIDDLE = replace(CASES["medium"], layers=6, width=128, kv_heads=4, mlp=320, vocabulary=500, examples=5)
# the shape of a real model of 30 layers, a quarter as wide: its vocabulary and depth are what memory must be found for
DEEP = replace(MIDDLE, layers=30, width=144, heads=9, kv_heads=3, mlp=384, vocabulary=49152, examples=6)


@pytest.mark.parametrize("kind", ["llama", "llama_gqa", "qwen2"])
def test_the_naive_side_equals_the_oracle(kind):
    model, pairs = random_model(kind), random_pairs()

    def measure(logits, index):
        return logits[..., 3] - logits[..., 4:8].mean(-1)

    with float64_softmax():
        naive = NaivePathPatcher(model, pairs, measure)
    outputs = head_outputs(model, pairs.clean_ids), head_outputs(model, pairs.corrupt_ids)
    senders = [(0, 1), (1, 3), (2, 0)]
    for receivers in (Receivers(), Receivers(Component.Q, ((1, 0), (2, 3))), Receivers(Component.V, ((1, 2), (2, 1)))):
        for position in ("last", "earlier"):
            with float64_softmax():
                ours = naive.head_effects(position, receivers, senders)
            slow = [naive_path_patching(model, pairs, position, [sender], receivers, *outputs) for sender in senders]
            expected = torch.stack([measure(logits, None) for logits in slow]) - naive.clean
            error = float((ours - expected).abs().max())
            print(kind, position, receivers.component, error, float(expected.abs().max()))
            assert error <= 1e-12


def test_arithmetic_is_that_of_the_matrices_of_every_token_layer():
    """And little beside, so that token-layers, which a narrow model counts quickly, say what a wide one takes: of path
    patching, circuits in place, heads removed, and transplants."""
    case = replace(MIDDLE, layers=8)
    model = build_model(case, torch.float32)
    pairs, walker, counted = build_pairs(case), Walker(model), TokenLayers(model)
    ids = pairs.clean_ids
    prompts = AnsweredPrompts(ids, ids[:, 0], ids[:, 1:4], pairs.positions)
    nodes = [Node(layer, layer % 4, position) for layer in range(8) for position in pairs.positions]
    means = mean_outputs(walker, ids, 64.0)
    run, donor = walker.run(ids), walker.run(pairs.corrupt_ids)
    patcher = PathPatcher(walker, pairs, build_measure(case), 64.0)
    work = {
        "path patching": lambda: patcher.head_effects("last", [Receivers()]),
        "evaluation": lambda: evaluate_circuits(walker, means, prompts, [nodes, nodes[:5], ()], [nodes[:8]], 64.0),
        "transplants": lambda: transplant(walker, run, donor, pairs.positions, nodes, 64.0),
    }
    block = model.model.layers[0]
    least = {"path patching": case.width * 3 * case.mlp}  # senders go through MLPs alone
    matrices = sum(weight.numel() for weight in block.parameters() if weight.ndim == 2)
    counted.take()
    for name, asked in work.items():
        with FlopCounterMode(display=False) as operations:
            asked()
        share = operations.get_total_flops() / (2 * matrices * counted.take())
        print(f"{name}: {share:.3f} of the matrices' operations")
        assert 0.95 * least.get(name, matrices) <= share * matrices <= 1.25 * matrices


def test_token_layers_are_those_of_the_formulas():
    case = replace(CASES["base"], examples=7, layers=4)
    model = build_model(case, torch.float32)
    pairs, measure = build_pairs(case), build_measure(case)
    walker, counted, prompts = Walker(model), TokenLayers(model), case.examples * case.tokens * case.layers
    ours = PathPatcher(walker, pairs, measure, 64.0)
    assert counted.take() == 2 * prompts
    naive = NaivePathPatcher(model, pairs, measure)
    assert counted.take() == 2 * prompts
    swept: dict[str, int] = {}
    for name, position, receivers in hops(case):
        naive.head_effects(position, receivers, case.timed_senders())
        assert counted.take() == case.senders * prompts * (1 if receivers.component is None else 2)

        ours.head_effects(position, [receivers])
        layers = sorted({layer for layer, _ in receivers.heads}) or [case.layers]
        # a sender passes one MLP in each layer from its own to below the highest receiver; once for each position
        sweep = case.heads * sum(layers[-1] - layer for layer in range(layers[-1])) * case.examples
        already = swept.get(position, 0)
        swept[position] = max(sweep, already)
        tail = 0
        if receivers.component is not None:
            for layer in range(layers[-1]):
                entry = min(receiver for receiver in layers if receiver > layer)
                lengths = (case.tokens - pairs.positions[position]).tolist()
                # every token from the position on, and in the last layer the last one
                tail += case.heads * sum(length * (case.layers - 1 - entry) + 1 for length in lengths)
        expected = swept[position] - already + tail
        print(name, "tail", tail, "sweep", swept[position] - already)
        assert counted.take() == expected > 0


@pytest.mark.parametrize("mib", [4.5, 10.0])
def test_the_working_set_stays_within_the_limit(mib):
    model = build_model(MIDDLE, torch.float32)
    walker, pairs, measure = Walker(model), build_pairs(MIDDLE), build_measure(MIDDLE)
    results = []
    with torch.no_grad(), LiveBytes() as live:
        live.leave_out(*model.parameters(), *model.buffers(), pairs.clean_ids, pairs.corrupt_ids, measure.tokens)
        ours = PathPatcher(walker, pairs, measure, mib)
        live.leave_out(ours.clean, ours.corrupt, ours.predictions)
        for _, position, receivers in hops(MIDDLE):
            results.append(ours.head_effects(position, [receivers])[0])
    print(f"limit {mib} MiB, peak {live.peak / 2**20:.2f} MiB")
    assert live.peak <= mib * 2**20
    wide = PathPatcher(walker, pairs, measure, 4096.0)
    for (name, position, receivers), effects in zip(hops(MIDDLE), results, strict=True):
        error = float((effects - wide.head_effects(position, [receivers])[0]).abs().max())
        print(name, error, float(effects.abs().max()))
        assert error <= 1e-4 * float(effects.abs().max())


@pytest.mark.parametrize(("mib", "whole"), [(8.0, False), (16.0, True)])
def test_the_working_set_of_a_deep_model_with_a_large_vocabulary_stays_within_the_limit(mib, whole):
    model = build_model(DEEP, torch.float32)
    walker, pairs, few = Walker(model), build_pairs(DEEP), build_measure(DEEP)
    measure = (lambda logits, index: logits[..., 0] - logits.logsumexp(-1)) if whole else few
    chosen = torch.zeros(10, DEEP.layers, DEEP.heads, dtype=torch.bool)
    chosen[torch.arange(10), torch.arange(0, 30, 3), torch.arange(10) % 9] = True
    receivers = Receivers(Component.V, ((12, 1), (29, 2)))
    with torch.no_grad(), LiveBytes() as live:
        live.leave_out(*model.parameters(), *model.buffers(), pairs.clean_ids, pairs.corrupt_ids, few.tokens)
        ours = PathPatcher(walker, pairs, measure, mib)
        live.leave_out(ours.clean, ours.corrupt, ours.predictions)
        results = [ours.effects("last", chosen, [Receivers()])[0]]
        results += ours.effects("query_label", chosen[::4], [receivers])
    print(f"limit {mib} MiB, peak {live.peak / 2**20:.2f} MiB")
    assert live.peak <= mib * 2**20
    wide = PathPatcher(walker, pairs, measure, 4096.0)
    expected = [wide.effects("last", chosen, [Receivers()])[0], *wide.effects("query_label", chosen[::4], [receivers])]
    for mine, theirs in zip(results, expected, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-5  # of logits of about 1, in float32


def test_what_does_not_fit_is_not_made_again_for_every_question():
    case = replace(CASES["base"], examples=7, layers=4)
    model = build_model(case, torch.float32)
    walker, pairs, measure = Walker(model), build_pairs(case), build_measure(case)
    receivers = Receivers(Component.V, ((2, 0), (3, 1)))
    run, counts = case.examples * case.tokens * case.layers, {}
    for mib in (0.9, 4.0, 64.0):
        counted = TokenLayers(model)
        ours = PathPatcher(walker, pairs, measure, mib)
        assert counted.take() == 2 * run
        assert (ours._runs is not None) == (mib == 64.0) and len(ours._chains) == 3
        ours.joint_effects("last", [Receivers()])
        counts[mib] = [counted.take()]
        for position in ("query_label", "query_label", "earlier_label", "earlier_label"):
            ours.joint_effects(position, [receivers])
            counts[mib].append(counted.take())
    print(counts)
    wide = counts[64.0]
    assert wide[0] == case.examples * case.layers
    # the tails of q, k and v need a clean run of the prompts, and nothing else: every time, or once where what they
    # need from the position on fits
    assert [count - other for count, other in zip(counts[0.9], wide, strict=True)] == [0, run, run, run, run]
    assert [count - other for count, other in zip(counts[4.0], wide, strict=True)] == [0, run, 0, run, run]


def test_no_tensor_is_made_on_the_default_device():
    # what the engine makes goes to the model's device or, by name, to the CPU; anything else would be "meta" here
    case = CASES["qwen"].quick()
    model = build_model(case, torch.float32)
    pairs, measure = build_pairs(case), build_measure(case)
    plain = [
        PathPatcher(Walker(model), pairs, measure, 64.0).head_effects(position, [receivers])[0]
        for _, position, receivers in hops(case)
    ]
    with torch.device("meta"):
        ours = PathPatcher(Walker(model), pairs, measure, 64.0)
        for (_, position, receivers), expected in zip(hops(case), plain, strict=True):
            assert torch.equal(ours.head_effects(position, [receivers])[0], expected)


def test_a_quick_run_writes_the_record_and_fits_the_readme(tmp_path):
    main(
        ["--quick", "--cases", "qwen", "--output", str(tmp_path / "b.json"), "--threads", "1", "--receivers", "spread"]
    )
    record = json.loads((tmp_path / "b.json").read_text())
    (model,) = record["models"]
    assert [row["hop"] for row in model["hops"]] == [RUNS, *(name for name, _, _ in hops(CASES["qwen"]))]
    assert model["max_difference_float64"]["difference"] <= 1e-9
    assert model["max_difference_float64"]["largest_effect"] > 1e-3
    assert model["total"]["token_layer_ratio"] > 1
    text = inserted(f"before\n{START}\nold\n{END}\nafter", "new")
    assert text == f"before\n{START}\nnew\n{END}\nafter"
    with pytest.raises(ValueError, match="no place for the table"):
        inserted("no marks", "new")


def test_memory_is_measured_in_this_process_too():
    measured = memory(CASES["base"].quick(), "cpu", torch.float32, 1, isolated=False)
    print(measured)
    assert measured["budget_mib"] == 64
