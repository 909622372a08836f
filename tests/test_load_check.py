"""The check at load: every family passes, in low precision and with huge activations too; what is wrong is named."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.llama import modeling_llama

from stages.circuits.architecture import Architecture
from stages.circuits.architectures import Gemma2, Gemma3, Gpt2, GptNeoX, Llama, Mistral
from stages.circuits.load_check import differences
from stages.circuits.walker import Walker
from stages.pipeline.stage import Invalid
from tests.oracles import FAMILIES, float64_softmax, random_model, walker_of

PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def errors(walker: Walker) -> dict[str, tuple[float, float]]:
    """Site -> largest error and tolerance over the layers."""
    found: dict[str, tuple[float, float]] = {}
    for at in differences(walker.model, walker.architecture, walker.kv_head):
        site = re.sub(r" of layer \d+", "", at.site)
        found[site] = (max(at.error, found.get(site, (0.0, 0.0))[0]), at.tolerance)
    return found


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_passes_far_below_the_tolerance(kind: str, dtype: torch.dtype) -> None:
    model: Any = random_model(kind)
    model = model.to(dtype)
    with float64_softmax():
        found = errors(Walker(model))
    print(kind, dtype, {site: f"{error:.1e}" for site, (error, _) in found.items()})
    if dtype == torch.float64:
        assert max(error for error, _ in found.values()) <= 1e-12
    assert all(error <= tolerance / 2 for error, tolerance in found.values())
    assert model.config.get_text_config()._attn_implementation == "eager"


def one_rotary_base(self: Gemma3, x: Any, positions: Any) -> Any:
    cos, sin = self.backbone.rotary_emb(x, positions, "full_attention")
    return [(cos[:, None, :, None], sin[:, None, :, None])] * self.n_layers


def in_series(self: GptNeoX, layer: int, entering: Any, attention: Any) -> Any:
    block, middle = self.layers[layer], entering + attention
    return middle + block.mlp(block.post_attention_layernorm(middle))


def parts_in_another_order(self: GptNeoX, layer: int, normed: Tensor) -> tuple[Tensor, ...]:
    fused = self.layers[layer].attention.query_key_value(normed)
    return fused.unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)


def rotated_by_pairs(self: Llama, layer: int, component: str, x: Tensor, rotary: Any) -> Tensor:
    (cos, sin), other = rotary, torch.empty_like(x)
    other[..., ::2], other[..., 1::2] = -x[..., 1::2], x[..., ::2]
    return x * cos + other * sin


def unscaled(self: Gemma2, input_ids: Tensor) -> Tensor:
    return self.backbone.embed_tokens.weight[input_ids]


turned = Llama.output_weight
# a wrong answer of an adapter, a model on which it must show, and where
MISTAKES: dict[str, tuple[str, type, str, Any, str]] = {
    "no scale on embeddings": ("gemma2", Gemma2, "embed", unscaled, "the embedding"),
    "no norm after attention": (
        "gemma2",
        Gemma2,
        "after_attention",
        Llama.after_attention,
        "the output of the block of layer 0",
    ),
    "no soft cap on attention": ("gemma2", Gemma2, "softcap", lambda self, layer: None, "z of layer 0"),
    "no soft cap on logits": ("gemma2", Gemma2, "final_softcap", Llama.final_softcap, "the logits"),
    "a soft cap on attention": ("gemma3", Gemma3, "softcap", lambda self, layer: 1.0, "z of layer 0"),
    "one rotary base": ("gemma3", Gemma3, "rotary", one_rotary_base, "q of layer 0"),
    "dimensions rotated in pairs": ("llama", Llama, "place", rotated_by_pairs, "q of layer 0"),
    "no norm on q and k": ("qwen3", Llama, "place", Architecture.place, "q of layer 0"),
    "blocks in series": ("gpt_neox", GptNeoX, "after_attention", in_series, "the output of the block of layer 0"),
    "q, k and v in another order": ("gpt_neox", GptNeoX, "_fused", parts_in_another_order, "q of layer 0"),
    "another scale": ("gpt2", Gpt2, "scaling", lambda self, layer: 8**-0.5, "z of layer 1"),
    "heads in another order": (
        "llama",
        Llama,
        "output_weight",
        lambda self, layer: turned(self, layer).roll(8, 1),
        "the sum of what heads write to the attention output of layer 0",
    ),
    "no sliding window": ("gemma3", Llama, "reach", lambda self, layer: None, "the mask of layer 0"),
    "a window in every layer": ("gemma3", Llama, "reach", lambda self, layer: 4, "the mask of layer 2"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_adapter_is_found_by_layer_and_site(
    mistake: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, family, method, wrong, where = MISTAKES[mistake]
    model: Any = random_model(kind)
    model = model.to(dtype)
    right = errors(walker_of(model))
    monkeypatch.setattr(family, method, wrong)
    with pytest.raises(Invalid, match="does not reproduce this model at " + where) as refused:
        walker_of(model)
    print(f"{mistake}, {dtype}: {refused.value}; the right adapter: {max(right.values())}")
    assert "\n" not in str(refused.value)
    assert model.config._attn_implementation == "eager", "also put back after a refusal"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("off", [-1, 1, None])
@pytest.mark.parametrize("window", [4, 20, 25, 4096, 131072])
def test_a_sliding_window_is_checked_to_the_token(
    window: int, off: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    config = MistralConfig(
        vocab_size=9, num_key_value_heads=1, sliding_window=window, max_position_embeddings=2**18, **sizes
    )
    model = MistralForCausalLM(config).eval()
    Walker(model)
    monkeypatch.setattr(Mistral, "reach", lambda self, layer: None if off is None else window + off)
    if window == 131072 and off != -1:
        Walker(model)  # reaches beyond the farthest query that is asked
    else:
        with pytest.raises(Invalid, match="the mask of layer 0: Hugging Face's query at position") as refused:
            Walker(model)
        print(refused.value)


def test_a_model_that_looks_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", create_bidirectional_mask)
    with pytest.raises(Invalid, match="the mask of layer 0: .* query at position 0 sees the key at position 1"):
        walker_of(random_model("llama"))


def test_key_value_heads_that_are_shared_in_another_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama_gqa")
    with monkeypatch.context() as patch:
        patch.setattr(Walker, "kv_head", lambda self, head: head % self.n_kv_heads)
        with pytest.raises(Invalid, match="do not share key-value heads in consecutive groups"):
            walker_of(model)
    monkeypatch.setattr(modeling_llama, "repeat_kv", lambda x, times: x.repeat(1, times, 1, 1))
    with pytest.raises(Invalid, match="does not reproduce this model at z of layer 0: off by"):
        walker_of(model)


@pytest.mark.parametrize(
    ("module", "wrong", "where"),
    [
        ("layers.1", lambda module, args, output: output * 1.5, "the output of the block of layer 1"),
        ("layers.1.self_attn", lambda module, args, output: (output[0] * 2, *output[1:]), "the output of the block of"),
        ("embed_tokens", None, ""),  # the adapter calls the same module, so it sees the edit too
        ("layers.2.mlp", None, ""),
    ],
)
def test_what_a_model_does_between_its_modules_is_found(module: str, wrong: Any, where: str) -> None:
    model: Any = random_model("llama")
    hook: Callable[..., Any] = wrong or (lambda module, args, output: output * 1.5)
    model.model.get_submodule(module).register_forward_hook(hook)
    if wrong is None:
        walker_of(model)
    else:
        with pytest.raises(Invalid, match=where):
            walker_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_huge_activations_neither_refuse_a_model_nor_hide_a_mistake(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One MLP writes thousands into one dimension at every token, a later one takes them out again."""
    model: Any = random_model("llama", n_layers=6)
    for layer, sign in ((1, 1), (4, -1)):
        projection = model.model.layers[layer].mlp.down_proj
        projection.bias = nn.Parameter(torch.zeros(32, dtype=torch.float64))
        projection.bias[3] = sign * 20000
    model = model.to(dtype)
    walker = Walker(model)
    found = errors(walker)
    ids = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))
    stream = float(walker.run(ids).residual[3].abs().max())
    by_kernel = [model(ids, use_cache=False).logits]
    model.set_attn_implementation("sdpa")
    by_kernel.append(model(ids, use_cache=False).logits)
    apart = float((by_kernel[0] - by_kernel[1]).abs().max() / by_kernel[0].abs().max())
    print(f"{dtype}: stream {stream:.0f}, check {max(found.values())}, Hugging Face's kernels apart {apart:.1e}")
    assert stream > 15000
    assert model.config._attn_implementation == "sdpa"
    Walker(model)  # whatever implementation the model has
    after = Llama.after_attention

    def without_mlp(self: Llama, layer: int, entering: Tensor, attention: Tensor) -> Tensor:
        return entering + attention if layer == 3 else after(self, layer, entering, attention)

    monkeypatch.setattr(Llama, "after_attention", without_mlp)
    with pytest.raises(Invalid, match="the output of the block of layer 3") as refused:
        Walker(model)
    print(refused.value)


def test_the_check_at_load_is_cheap() -> None:
    settings: dict[str, Any] = dict(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        Walker(model)
        seconds.append(time.perf_counter() - start)
    print(f"{min(seconds) * 1000:.1f} ms")
    assert min(seconds) < 0.25  # 50 ms without the shape checks of the tests, on a machine with nothing else to do
