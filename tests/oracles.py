"""Slow and obvious versions of the causal engine, on random models: whole hooked forward passes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import Receivers
from stages.circuits.trace import TraceDict
from stages.circuits.walker import Walker

VOCAB = 40
LENGTH = 24  # of prompts; longer than every sliding window below
KINDS = ("llama", "llama_gqa", "qwen2", "gemma2", "gemma3", "gpt_neox", "gpt2")  # one of each kind of block

_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    bos_token_id=None,  # prompts are random
    eos_token_id=None,
    pad_token_id=None,
)
_GROUPED: dict[str, Any] = dict(_SIZES, num_key_value_heads=2)
_NEAR, _FULL = "sliding_attention", "full_attention"
_GEMMA: dict[str, Any] = dict(
    _GROUPED,
    head_dim=12,
    query_pre_attn_scalar=20,
    final_logit_softcapping=3.0,
)
_ROTARY: dict[str, Any] = dict(rope_type="default", partial_rotary_factor=0.5, rope_theta=100.0)
_GEMMA_3: dict[str, Any] = dict(
    _GEMMA,
    sliding_window=4,
    layer_types=[_NEAR, _NEAR, _FULL],
    rope_parameters={
        _NEAR: {"rope_type": "default", "rope_theta": 10.0},
        _FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    },
)


def _with_vision(attn_implementation: str, **settings: Any) -> Gemma3Config:
    """A text model beside a vision tower that nothing here looks at."""
    attention: dict[str, Any] = {"attn_implementation": attn_implementation}
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
    )
    return Gemma3Config(
        text_config=Gemma3TextConfig(**settings),
        vision_config=vision,
        mm_tokens_per_image=4,
        **attention,
    )


# a class of models, its config, and what is set in it; what is peculiar to a family is made to matter on LENGTH tokens
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, dict(_SIZES, num_key_value_heads=4)),
    "llama_gqa": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "mistral": (MistralForCausalLM, MistralConfig, dict(_GROUPED, sliding_window=8)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GROUPED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(_GROUPED, head_dim=12)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        dict(_GEMMA, attn_logit_softcapping=1.5, sliding_window=8, layer_types=[_NEAR, _FULL, _NEAR]),
    ),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _GEMMA_3),
    "gemma3_multimodal": (Gemma3ForConditionalGeneration, _with_vision, _GEMMA_3),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, dict(_SIZES, rope_parameters=_ROTARY)),
    "gpt_neox_in_series": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        dict(_SIZES, rope_parameters=_ROTARY, use_parallel_residual=False),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        dict(
            vocab_size=VOCAB,
            n_embd=32,
            n_inner=48,
            n_head=4,
            n_positions=32,
            bos_token_id=None,
            eos_token_id=None,
            scale_attn_by_inverse_layer_idx=True,
        ),
    ),
}
FAMILIES = tuple(MODELS)


def random_model(
    kind: str, n_layers: int = 3, seed: int = 0, variant: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """A float64 model with random weights, biases and norms, whose norms compute in float64 as well.

    Args:
        kind: a key of MODELS.
        variant: settings of the config beside those of MODELS, or instead of them.
    """
    model_class, config_class, settings = deepcopy(MODELS[kind])  # configs write into what they are given
    layers = {"n_layer" if kind == "gpt2" else "num_hidden_layers": n_layers}
    rest = {} if kind == "gpt2" else {"max_position_embeddings": 64}
    settings = {**rest, **settings, **deepcopy(dict(variant or {}))}
    settings = {name: value[:n_layers] if name == "layer_types" else value for name, value in settings.items()}
    torch.manual_seed(seed)
    model = model_class(config_class(**settings, **layers, attn_implementation="eager")).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = ("norm" in name or "ln_" in name) and parameter.ndim == 1 and name.endswith("weight")
            matrix = 0.4 if kind.startswith("gpt") else 0.2  # so that heads matter next to the biases
            parameter.copy_(1 + 0.3 * noise if scale else noise * (0.5 if parameter.ndim == 1 else matrix))
            if scale and kind.startswith("gemma"):
                parameter.sub_(1)  # its norms add 1 to their weights
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):  # Hugging Face's norms round to float32
                setattr(
                    parent,
                    name,
                    _Norm(child, model.config.get_text_config().rms_norm_eps, float(kind.startswith("gemma"))),
                )
    return model


class _Norm(nn.Module):
    """An RMS norm that keeps float64."""

    def __init__(self, norm: Any, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = norm.weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def blocks(model: PreTrainedModel) -> list[str]:
    """Names of the layers."""
    stems = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h", "gemma3": "model.language_model.layers"}
    stem = stems.get(model.config.model_type, "model.layers")
    return [f"{stem}.{layer}" for layer in range(model.config.get_text_config().num_hidden_layers)]


def output_projections(model: PreTrainedModel) -> list[str]:
    """Names of the modules whose input is the head outputs, layer by layer."""
    own = {"gpt_neox": "attention.dense", "gpt2": "attn.c_proj"}.get(model.config.model_type, "self_attn.o_proj")
    return [f"{block}.{own}" for block in blocks(model)]


def head_width(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def projection(model: PreTrainedModel, component: str, layer: int, head: int) -> tuple[str, slice]:
    """The module that computes q, k or v of a query head, and the head's columns in its output."""
    config, width, block = model.config.get_text_config(), head_width(model), blocks(model)[layer]
    part = "qkv".index(component)
    if config.model_type == "gpt_neox":
        name, start = f"{block}.attention.query_key_value", (3 * head + part) * width
    elif config.model_type == "gpt2":
        name, start = f"{block}.attn.c_attn", part * config.hidden_size + head * width
    else:
        group = 1 if component == "q" else config.num_attention_heads // config.num_key_value_heads
        name, start = f"{block}.self_attn.{component}_proj", head // group * width
    return name, slice(start, start + width)


@contextmanager
def float64_softmax() -> Iterator[None]:
    """Eager attention of Hugging Face takes its softmax in float32; here it keeps float64."""
    original = nn.functional.softmax

    def softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return original(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **rest)

    nn.functional.softmax = softmax
    try:
        yield
    finally:
        nn.functional.softmax = original


def random_pairs(seed: int = 0, n: int = 5, length: int = LENGTH) -> AlignedPairs:
    """Random prompts; "earlier" differs between examples and partners, the other positions are shared.

    The last token sees "earlier" through a window of 8, and not much before it.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    fixed = {"last": torch.full((n,), length - 1), "query_label": torch.full((n,), length - 3)}
    return AlignedPairs(
        clean_ids=draw(0, VOCAB, n, length),
        corrupt_ids=draw(0, VOCAB, n, length),
        positions={**fixed, "earlier": draw(length - 8, length - 5, n)},
        corrupt_positions={**fixed, "earlier": draw(1, length - 3, n)},
    )


def hooked_logits(
    model: PreTrainedModel,
    ids: Int[Tensor, "n t"],
    edit_z: Callable[[int, Tensor], Tensor] | None = None,
    edits: dict[str, Callable[[Tensor], Tensor]] | None = None,
) -> Float[Tensor, "n vocab"]:
    """Logits at the last position of a plain forward pass with hooks.

    Args:
        edit_z: (layer, head outputs [n t h*a]) -> their replacement, before o_proj.
        edits: module name -> function of its output.
    """
    edits = edits or {}
    handles = []
    for layer, name in enumerate(output_projections(model)):
        if edit_z is not None:
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(lambda _, args, at=layer: (edit_z(at, args[0]),))
            )
    try:
        with torch.no_grad(), float64_softmax():
            with TraceDict(model, list(edits), edit_output=lambda output, layer: edits[layer](output)):
                return model(input_ids=ids, use_cache=False).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


def head_outputs(model: PreTrainedModel, ids: Int[Tensor, "n t"]) -> list[Float[Tensor, "n t h*a"]]:
    """Head outputs z of every layer."""
    names = output_projections(model)
    with torch.no_grad(), float64_softmax(), TraceDict(model, names, retain_input=True) as traced:
        model(input_ids=ids, use_cache=False)
    return [traced[name].input for name in names]


def naive_path_patching(
    model: PreTrainedModel,
    pairs: AlignedPairs,
    position: str,
    senders: list[tuple[int, int]],
    receivers: Receivers,
    clean: list[Tensor],
    corrupt: list[Tensor],
) -> Float[Tensor, "n vocab"]:
    """Logits after path patching one set of senders: two whole forward passes with hooks on every layer.

    Args:
        clean: `head_outputs` of the clean prompts; they do not depend on the senders.
        corrupt: those of the corrupt prompts.
    """
    width = head_width(model)
    at, corrupt_at, rows = pairs.positions[position], pairs.corrupt_positions[position], range(len(pairs.clean_ids))

    def frozen(layer: int, _: Tensor) -> Tensor:
        z = clean[layer].clone()
        for sender_layer, head in senders:
            if sender_layer == layer:
                for row in rows:
                    z[row, at[row], head * width : (head + 1) * width] = corrupt[layer][
                        row, corrupt_at[row], head * width : (head + 1) * width
                    ]
        return z

    if receivers.component is None:
        return hooked_logits(model, pairs.clean_ids, frozen)

    slots = [projection(model, receivers.component, layer, head) for layer, head in receivers.heads]
    names = {name for name, _ in slots}
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def store(output: Tensor) -> Tensor:
            read[name] = output.clone()
            return output

        return store

    hooked_logits(model, pairs.clean_ids, frozen, {name: keep(name) for name in names})

    def write(name: str) -> Callable[[Tensor], Tensor]:
        def replace(output: Tensor) -> Tensor:
            output = output.clone()
            for owner, columns in slots:
                if owner == name:
                    for row in rows:
                        output[row, at[row], columns] = read[name][row, at[row], columns]
            return output

        return replace

    return hooked_logits(model, pairs.clean_ids, None, {name: write(name) for name in names})


def walker_of(model: PreTrainedModel) -> Walker:
    with float64_softmax():
        return Walker(model)
