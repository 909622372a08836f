"""Families of decoders: what is refused, LoRA, low precision, and what a family's settings may change."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn

from stages.circuits.agreement import agreement
from stages.circuits.circuit import Component
from stages.circuits.lora import adapter_layers, merged
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.walker import Walker
from stages.pipeline.stage import Invalid
from tests.oracles import (
    FAMILIES,
    head_outputs,
    hooked_logits,
    naive_path_patching,
    output_projections,
    random_model,
    random_pairs,
    walker_of,
)

IDS = random_pairs().clean_ids


def lora_on(model: nn.Module, **settings: Any) -> PeftModel:
    """LoRA with random factors, so that it changes something."""
    base: Any = model
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return adapted.eval()


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_head_outputs_are_the_parts_of_the_attention_output(kind: str) -> None:
    model = random_model(kind)
    walker, whole = walker_of(model), []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output: whole.append(output))
        for name in output_projections(model)
    ]
    z = head_outputs(model, IDS)
    for hook in hooks:
        hook.remove()
    for layer in range(3):
        parts = walker.head_writes(layer, z[layer].unflatten(-1, (4, -1))).sum(-2)
        projection: Any = model.get_submodule(output_projections(model)[layer])
        bias = 0 if projection.bias is None else projection.bias
        error = float((parts + bias - whole[layer]).abs().max())
        print(kind, layer, error)
        assert error <= 1e-12


def test_models_that_cannot_be_walked_are_refused() -> None:
    gemma = random_model("gemma2")
    gemma.config.use_bidirectional_attention = True
    with pytest.raises(Invalid, match="use_bidirectional_attention = true"):
        Walker(gemma)
    gpt2: Any = random_model("gpt2")
    with pytest.raises(Invalid, match="call model.eval"):
        Walker(gpt2.train())
    with pytest.raises(Invalid, match="GPT2Model has no language-model head"):
        Walker(gpt2.transformer.eval())
    with pytest.raises(Invalid, match="model type 'None' is not supported"):
        Walker(nn.Linear(2, 2))
    with pytest.raises(Invalid, match="prompts of 33 tokens: this model takes at most 32"):
        walker_of(gpt2.eval()).run(torch.zeros(1, 33, dtype=torch.long))


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


NEAR, FULL = "sliding_attention", "full_attention"
LONG = {"long_factor": [1.0, 2.0, 3.0, 5.0], "short_factor": [1.0, 1.5, 2.0, 2.5]}
# settings that change how a family computes, each on a model where it matters on 24 tokens
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "biases, Qwen 3": ("qwen3", dict(attention_bias=True)),
    "biases, Gemma 2": ("gemma2", dict(attention_bias=True)),
    "no biases, NeoX": ("gpt_neox", dict(attention_bias=False)),
    "wide heads": ("llama", dict(head_dim=12)),
    "one key-value head": ("llama_gqa", dict(num_key_value_heads=1)),
    "one key-value head, Gemma 2": ("gemma2", dict(num_key_value_heads=1)),
    "one key-value head, Gemma 3": ("gemma3_multimodal", dict(num_key_value_heads=1)),
    "as many key-value heads as heads": ("qwen2", dict(num_key_value_heads=4)),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "tied, NeoX": ("gpt_neox", dict(tie_word_embeddings=True)),
    "untied, Gemma 2": ("gemma2", dict(tie_word_embeddings=False)),
    "untied, GPT-2": ("gpt2", dict(tie_word_embeddings=False)),
    "linear": ("llama", rope("linear", factor=3.0)),
    "dynamic": ("llama", rope("dynamic", factor=3.0) | dict(max_position_embeddings=16)),
    "YaRN": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "Llama 3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "LongRoPE, long": ("llama", rope("longrope", factor=4.0, original_max_position_embeddings=16, **LONG)),
    "LongRoPE, short": ("llama", rope("longrope", factor=4.0, original_max_position_embeddings=32, **LONG)),
    "YaRN, Qwen 3": ("qwen3", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "windows, Qwen 2": ("qwen2", dict(use_sliding_window=True, sliding_window=9, layer_types=[FULL, NEAR, NEAR])),
    "windows, Qwen 3": ("qwen3", dict(use_sliding_window=True, sliding_window=9, layer_types=[NEAR, FULL, NEAR])),
    "no window": ("mistral", dict(sliding_window=None)),
    "a window that is longer": ("mistral", dict(sliding_window=25)),
    "a window as long as the prompt": ("mistral", dict(sliding_window=24)),
    "another order of windows": ("gemma3", dict(layer_types=[FULL, NEAR, NEAR], sliding_window=9)),
    "full rotary": ("gpt_neox", rope("default", partial_rotary_factor=1.0)),
    "a quarter of rotary": ("gpt_neox_in_series", rope("default", partial_rotary_factor=0.25)),
    "unscaled attention": ("gpt2", dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=False)),
    "no soft caps": ("gemma2", dict(attn_logit_softcapping=None, final_logit_softcapping=None)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants_of_families_equal_hugging_face_and_the_naive_version(variant: str) -> None:
    kind, settings = VARIANTS[variant]
    model, pairs = random_model(kind, variant=settings), random_pairs(n=3)
    patcher = PathPatcher(walker_of(model), pairs, lambda logits, index: logits[..., 3], 64.0)
    run = patcher.walker.run(pairs.clean_ids)
    outputs = head_outputs(model, pairs.clean_ids), head_outputs(model, pairs.corrupt_ids)
    errors = [
        float((run.logits - hooked_logits(model, pairs.clean_ids)).abs().max()),
        float((run.z.flatten(-2) - torch.stack(outputs[0])).abs().max()),
    ]
    plain = hooked_logits(random_model(kind), pairs.clean_ids)
    changed, largest = float((run.logits - plain).abs().max()), 0.0
    for component in (None, *Component):
        receivers = Receivers() if component is None else Receivers(component, ((1, 0), (2, 3)))
        effects = patcher.head_effects("last", [receivers])[0]
        for layer, head in ((0, 1), (1, 2)):
            naive = naive_path_patching(model, pairs, "last", [(layer, head)], receivers, *outputs)
            expected = naive[:, 3] - patcher.clean
            errors.append(float((effects[layer, head] - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    print(f"{variant}: max error {max(errors):.1e}, max effect {largest:.1e}, changes logits by {changed:.1e}")
    assert max(errors) <= 1e-11 and largest > 1e-2 and changed > 1e-3


@torch.no_grad()
def test_lora_is_refused_unmerged_and_exact_merged() -> None:
    for kind, targets in (
        ("qwen2", ["q_proj", "v_proj", "o_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
    ):
        plain = hooked_logits(random_model(kind), IDS)
        fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
        adapted = lora_on(random_model(kind), target_modules=targets, **fan)
        inner: Any = adapted.get_base_model()
        expected = hooked_logits(inner, IDS)
        for unmerged in (adapted, inner):
            with pytest.raises(Invalid, match="merge them first, with stages.circuits.lora.merged"):
                Walker(unmerged)
        model = merged(adapted)
        error = float((hooked_logits(model, IDS) - expected).abs().max())
        walked = float((walker_of(model).run(IDS).logits - expected).abs().max())
        print(f"{kind}: merged - unmerged {error:.1e}, walked {walked:.1e}, LoRA {(expected - plain).abs().max():.1e}")
        assert max(error, walked) <= 1e-11 and float((expected - plain).abs().max()) > 1e-2
        assert not adapter_layers(model) and not isinstance(model, PeftModel)
        assert merged(model) is model


def test_adapters_that_cannot_be_merged_are_refused() -> None:
    base: Any = random_model("llama")
    prefix = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(Invalid, match="an adapter of type PREFIX_TUNING cannot be merged"):
        merged(prefix)
    with pytest.raises(Invalid, match="not a Hugging Face model itself"):
        Walker(prefix)
    with pytest.raises(Invalid, match="a Linear cannot be merged"):
        merged(nn.Linear(2, 2))
    broken = lora_on(random_model("llama"), target_modules=["v_proj"])
    with torch.no_grad():
        next(p for name, p in broken.named_parameters() if "lora_A" in name).fill_(float("nan"))
    with pytest.raises(Invalid, match="the adapters cannot be merged"):
        merged(broken)


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma3", "gpt_neox", "gpt2"])
def test_bfloat16_ranks_heads_as_float32_does(kind: str) -> None:
    pairs = random_pairs(n=600)
    receivers = [Receivers(), Receivers(Component.V, ((2, 0), (2, 3)))]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = random_model(kind)
        model = model.to(dtype)
        patcher = PathPatcher(Walker(model), pairs, lambda logits, index: logits[..., 3] - logits[..., 5], 64.0)
        assert patcher.clean.dtype == torch.float32
        found[dtype] = [effects.mean(-1).abs() for effects in patcher.head_effects("last", receivers)]
    for receiver, exact, rounded in zip(receivers, found[torch.float32], found[torch.bfloat16], strict=True):
        both = agreement(exact, rounded, (3, 5))
        print(f"{kind} -> {receiver}: {both}")
        # the second hop's effects, .01 of a logit, are near what bfloat16 resolves
        size, least = (12, 0.9) if receiver.component is None else (8, 0.7)
        assert both.n == size and both.spearman is not None and both.spearman > least


def test_agreement_by_hand() -> None:
    one = torch.tensor([[0.0, 4.0, 3.0], [2.0, 1.0, 0.0]])
    other = torch.tensor([[0.0, 3.0, 4.0], [1.0, 2.5, 0.5]])
    both = agreement(one, other, (1, 2, 3, 9))
    # ranks 5 4 3 2 1 and 4 5 2 3 1: squared differences 1 1 1 1 0; 1 - 6 * 4 / (5 * 24) = .8
    assert both.n == 5 and both.spearman == pytest.approx(0.8)
    assert both.top == {1: 0.0, 2: 1.0, 3: pytest.approx(2 / 3)}
    assert both.chance == {1: 0.2, 2: 0.4, 3: 0.6} and both.largest_difference == 1.5
    assert agreement(torch.zeros(2, 2), torch.zeros(2, 2)).spearman is None
    with pytest.raises(Invalid, match="a score is nan in example 2"):
        agreement(one, torch.full((2, 3), float("nan")).where(other == 1.0, other))


def test_patching_beyond_the_sliding_window_does_nothing() -> None:
    model, pairs = random_model("mistral", n_layers=2), random_pairs()
    first = torch.zeros(5, dtype=torch.long)  # the last token sees 8
    pairs = replace(pairs, positions={"first": first}, corrupt_positions={"first": first})
    patcher = PathPatcher(walker_of(model), pairs, lambda logits, index: logits[..., 3], 64.0)
    receivers = Receivers(Component.V, ((1, 0), (1, 3)))
    effects = patcher.head_effects("first", [receivers])[0]
    outputs = head_outputs(model, pairs.clean_ids), head_outputs(model, pairs.corrupt_ids)
    naive = naive_path_patching(model, pairs, "first", [(0, 1)], receivers, *outputs)[:, 3] - patcher.clean
    print(float(effects.abs().max()), float(naive.abs().max()))
    assert max(float(effects.abs().max()), float(naive.abs().max())) <= 1e-13
