"""Distances between a base and a tuned model, against sums worked out by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.learning.probes import last_logits
from stages.measures.alignment import last_streams, layer_cka
from stages.measures.divergence import divergences, kl, total_variation
from stages.measures.weights import per_head, per_matrix, whole
from stages.pipeline.resources import MEMORY_MIB, PROCESSES
from stages.pipeline.stage import Cell, Invalid
from tests.comparing import record_difference
from tests.oracles import (
    FAMILIES,
    head_width,
    output_projections,
    projection,
    random_model,
    random_pairs,
    walker_of,
)


def tiny_model(key_value_heads: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=key_value_heads, head_dim=6, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_divergences_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    logits = [(torch.log(x.clamp(min=1e-30)) + shift) for x, shift in ((p, 3.0), (q, -2.0))]
    expected = 0.5 * math.log(2)
    error = abs(kl(*logits).item() - expected)
    print(f"maximum error {error:.1e}")
    assert error < 1e-6
    assert total_variation(*logits).item() == pytest.approx(0.25, abs=1e-6)
    assert total_variation(logits[1], logits[0]).item() == pytest.approx(0.25, abs=1e-6)


def test_divergences_vanish_only_between_equal_models_and_obey_pinsker() -> None:
    a, b = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)), torch.randn(50, 30) * 2
    assert divergences(a, a + 5.0) == pytest.approx({"kl": 0.0, "reverse_kl": 0.0, "tv": 0.0}, abs=1e-6)
    forward, backward = divergences(a, b), divergences(b, a)
    assert forward["kl"] == backward["reverse_kl"] != forward["reverse_kl"]
    assert (total_variation(a, b) <= (kl(a, b) / 2).sqrt()).all()


BIASED = [kind for kind in FAMILIES if kind.startswith(("qwen2", "gpt"))]


@pytest.mark.parametrize(
    ("kind", "component"),
    [
        *((kind, component) for kind in FAMILIES for component in "qkvo"),
        *((kind, f"bias of {component}") for kind in BIASED for component in "qkv"),
    ],
)
def test_change_of_one_head_is_seen_at_that_head(kind: str, component: str) -> None:
    """The change is made by the name and place that the oracles know, in layer 1 at head 2."""
    base, tuned = random_model(kind), random_model(kind)
    weights, part = dict(tuned.named_parameters()), component[-1]
    if part == "o":
        width, shared = head_width(tuned), False
        name, place = f"{output_projections(tuned)[1]}.weight", slice(2 * width, 3 * width)
    else:
        module, place = projection(tuned, part, 1, 2)
        name, shared = f"{module}.{'bias' if 'bias' in component else 'weight'}", part in "kv"
    with torch.no_grad():  # of Hugging Face's own matrices, GPT-2's have outputs in columns; heads are inputs of o
        columns = weights[name].ndim == 2 and (kind == "gpt2") != (part == "o")
        chosen = weights[name][:, place] if columns else weights[name][place]
        size, before = chosen.numel(), weights[name].clone()
        chosen += 0.5
        assert int((weights[name] != before).sum()) == size
    norms = {(layer, head): norm for layer, head, norm, _ in per_head(base, tuned)}
    group = getattr(base.config.get_text_config(), "num_key_value_heads", 4) or 4
    heads = [2, 3] if shared and group == 2 else [2]  # the other head that reads the same keys or values
    expected = {(layer, head): 0.0 for layer in range(3) for head in range(4)}
    expected |= {(1, head): 0.5 * math.sqrt(size) for head in heads}
    print(kind, component, "maximum error", max(abs(norms[key] - expected[key]) for key in expected))
    assert norms == pytest.approx(expected, abs=1e-10)
    relative = [row[3] for row in per_head(base, tuned) if row[:2] == (1, 2)][0]
    assert 0 < relative < 20


def test_heads_matrices_and_the_whole_add_up() -> None:
    base, tuned = tiny_model(4, 0), tiny_model(4, 1)
    absolute, relative = per_matrix(base, tuned)
    norm, norm_relative = whole(base, tuned)
    assert math.sqrt(sum(value**2 for value in absolute.values())) == pytest.approx(norm)
    attention = sum(value**2 for name, value in absolute.items() if "self_attn" in name)
    heads = sum(row[2] ** 2 for row in per_head(base, tuned))
    print(f"maximum error {abs(heads - attention):.1e}")
    assert heads == pytest.approx(attention)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = dict(base.named_parameters())[name], dict(tuned.named_parameters())[name]
    assert relative[name] == pytest.approx(((weights[1] - weights[0]).norm() / weights[0].norm()).item(), rel=1e-5)
    size = math.sqrt(sum(w.double().square().sum().item() for w in base.parameters()))
    assert norm_relative == pytest.approx(norm / size)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen2"])
def test_heads_of_families_with_biases_add_up(kind: str) -> None:
    """All of attention but the output's bias belongs to some head; each key-value head of Qwen2 to two."""
    base, tuned = random_model(kind), random_model(kind, seed=1)
    absolute, _ = per_matrix(base, tuned)
    inside = {
        name: norm for name, norm in absolute.items() if ".attn." in name or "attention." in name or "_attn" in name
    }
    output_bias = tuple(f"{name}.bias" for name in output_projections(base))
    expected = sum(
        norm**2 * (2 if ".k_proj" in name or ".v_proj" in name else 1)
        for name, norm in inside.items()
        if name not in output_bias and "layernorm" not in name
    )
    heads = sum(row[2] ** 2 for row in per_head(base, tuned))
    print(f"maximum error {abs(heads - expected):.1e}")
    assert heads == pytest.approx(expected, rel=1e-12)


def test_models_of_other_sizes_or_families_are_refused() -> None:
    with pytest.raises(Invalid, match=r"\(2, 4, 2, 6, 16\) and \(2, 4, 4, 6, 16\): must be the same"):
        per_head(tiny_model(2, 0), tiny_model(4, 0))
    with pytest.raises(Invalid, match="model type 'None' is not supported"):
        per_head(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_stage_drift_measures_of_weights_and_streams_is_there_for_every_family(kind: str) -> None:
    base, tuned = random_model(kind), random_model(kind, seed=1)
    ids = random_pairs().clean_ids
    cka: Any = layer_cka(*(last_streams(walker_of(model), ids) for model in (base, tuned)))
    assert len(per_head(base, tuned)) == 12 and len(cka["layers"]) == 3
    assert whole(base, base) == (0.0, 0.0) and whole(base, tuned)[0] > 0
    assert divergences(last_logits(base, ids), last_logits(base, ids))["kl"] == pytest.approx(0, abs=1e-12)


def _prepare(folder: Path, identifiable_accuracy: float) -> None:
    """Data, models and the record of the base's discovery, with two hops."""
    from stages.pipeline.files import write_json, write_npz
    from stages.tasks.examples import Examples, Prompts, write_examples, write_prompts

    ids = torch.randint(1, 30, (12, 9), generator=torch.Generator().manual_seed(0))
    column, last = ids[:, 0], {"last": torch.full((12,), 8)}
    examples = Examples(ids, column, ids[:, 1:3], last, {"last": last["last"][:, None]}, ids.flip(1), last)
    for name in ("evaluation", "discovery", "relearning", "selection"):
        write_examples(folder / f"data/old/{name}.parquet", examples)
    write_prompts(folder / "data/new/adjacent/evaluation.parquet", Prompts(ids.flip(0), ids[:, :2], column, ids[:, :3]))
    for where, seed in (("models/base/0", 0), ("models/grpo/0", 1)):
        tiny_model(2, seed).save_pretrained(folder / where)
    hops = [
        {"name": "answer", "position": "last", "component": None, "feeds": [], "joint": 1.0},
        {"name": "q_last", "position": "last", "component": "q", "feeds": [[1, 0], [1, 2]], "joint": 0.5},
        {"name": "k_last", "position": "last", "component": "k", "feeds": [[1, 0]], "joint": 0.0},
    ]
    settings = {"examples": 12, "score": "logit_difference", "identifiable_accuracy": identifiable_accuracy}
    scores = {
        f"{hop}.half{half}": torch.randn(2, 4, generator=torch.Generator().manual_seed(half)).numpy()
        for hop in ("answer", "q_last")
        for half in (0, 1)
    }
    write_json(folder / "reports/cells/discover/base/0/record.json", {"hops": hops, "size": 3, "settings": settings})
    write_npz(folder / "reports/cells/discover/base/0/scores.npz", **scores)


def _run_stage(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    from stages import drift

    monkeypatch.chdir(folder)
    relearning = {"examples": 12, "probe_examples": 12, "share": 0.0, "most_steps": 1, "learning_rate": 1e-3}
    section = {"n_examples": 10, "strong_edge": 0.05, "permutations": 20, "seed": 0}
    section["relearning"] = SimpleNamespace(**relearning, betas=(0.9, 0.999), weight_decay=0.0)
    params = {"drift": SimpleNamespace(**section), "new_task": "adjacent"}
    monkeypatch.setattr(Cell, "params", lambda cell, path: params[path])
    drift.main(Cell("drift", {"arm": "grpo", "seed": "0"}))
    return json.loads(Path("reports/cells/drift/grpo/0.json").read_text())


def test_stage_writes_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare(tmp_path, 0.0)
    record = _run_stage(monkeypatch, tmp_path)
    assert set(record["old"]) == set(record["new"]) == {"kl", "reverse_kl", "tv"}
    ids = torch.randint(1, 30, (12, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base, tuned = (tiny_model(2, seed)(ids[:10]).logits[:, -1].double().log_softmax(-1) for seed in (0, 1))
    expected = (base.exp() * (base - tuned)).sum(-1).mean().item()
    print(f"maximum error {abs(record['old']['kl'] - expected):.1e}")
    assert record["old"]["kl"] == pytest.approx(expected, rel=1e-5)
    assert len(record["per_head"]) == 8 and len(record["per_head"][0]) == 3
    assert len(record["cka"]["layers"]) == 2 and record["relearning"]["steps"] == 0
    assert record["relearning"]["before"] == record["relearning"]["after"]
    retraced = record["retraced"]
    column = ids[:, :1]
    with torch.no_grad():
        logits = tiny_model(2, 1)(ids).logits[:, -1].double()
    difference = (logits.gather(1, column)[:, 0] - logits.gather(1, ids[:, 1:3]).mean(1)).mean().item()
    assert retraced["logit_difference"] == pytest.approx(difference, rel=1e-4)
    assert retraced["p_correct"] == pytest.approx(logits.softmax(1).gather(1, column).mean().item(), rel=1e-4)
    assert retraced["identifiable"] and set(retraced["similarity"]["hops"]) == {"answer", "q_last"}
    assert set(retraced["joint"]) == {"answer", "q_last", "k_last"} and retraced["joint"]["q_last"]["base"] == 0.5
    assert retraced["overlap"]["nodes"] == 8 and retraced["overlap"]["at_circuit"]["size"] == 3
    with np.load("reports/cells/drift/grpo/0.npz") as arrays:
        assert sorted(arrays) == ["answer.half0", "answer.half1", "q_last.half0", "q_last.half1"]
        assert not arrays["q_last.half0"][1].any() and arrays["q_last.half0"][0].any()
    for processes, memory_mib in (("1", "512"), ("3", "0.001")):
        monkeypatch.setenv(PROCESSES, processes)
        monkeypatch.setenv(MEMORY_MIB, memory_mib)
        error = record_difference(_run_stage(monkeypatch, tmp_path), record)
        print(f"{processes} processes, {memory_mib} MiB: max error {error:.1e}")
        assert error <= 1e-5, "in float32"


def test_stage_does_not_retrace_where_the_model_cannot_do_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepare(tmp_path, 1.0)
    retraced = _run_stage(monkeypatch, tmp_path)["retraced"]
    assert not retraced["identifiable"] and "is below 1" in retraced["reason"]
    assert retraced["similarity"] is retraced["overlap"] is retraced["edges"] is None
    with np.load("reports/cells/drift/grpo/0.npz") as arrays:
        assert list(arrays) == []
