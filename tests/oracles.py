"""Slow and obvious versions of the causal engine, on random models: whole hooked forward passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.path_patching import Pairs, Receivers
from stages.circuits.trace import TraceDict
from stages.circuits.types import Component
from stages.circuits.walker import Walker

VOCAB = 40
KINDS = ("llama", "llama_gqa", "qwen2")


def random_model(kind: str, n_layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A float64 model with random weights, biases and norms, whose norms compute in float64 as well.

    Args:
        kind: "llama" (4 heads), "llama_gqa" (2 key-value heads) or "qwen2" (grouped too, with biases).
    """
    config_class: Any = Qwen2Config if kind == "qwen2" else LlamaConfig
    model_class: Any = Qwen2ForCausalLM if kind == "qwen2" else LlamaForCausalLM
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4 if kind == "llama" else 2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = model_class(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * (0.5 if parameter.ndim == 1 else 0.2))
    for parent in [model.model, *model.model.layers]:
        for name, child in list(parent.named_children()):
            if name.endswith("norm"):  # Hugging Face's norms round to float32
                norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


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


def random_pairs(seed: int = 0, n: int = 5, length: int = 11) -> Pairs:
    """Random prompts; "earlier" differs between examples and partners, the other positions are shared."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    fixed = {"last": torch.full((n,), length - 1), "query_label": torch.full((n,), length - 3)}
    return Pairs(
        clean_ids=draw(0, VOCAB, n, length),
        corrupt_ids=draw(0, VOCAB, n, length),
        positions={**fixed, "earlier": draw(1, 4, n)},
        corrupt_positions={**fixed, "earlier": draw(1, 7, n)},
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
    for layer, block in enumerate(model.model.layers):
        if edit_z is not None:
            handles.append(
                block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, at=layer: (edit_z(at, args[0]),))
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
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(model.config.num_hidden_layers)]
    with torch.no_grad(), float64_softmax(), TraceDict(model, names, retain_input=True) as traced:
        model(input_ids=ids, use_cache=False)
    return [traced[name].input for name in names]


def naive_path_patching(
    model: PreTrainedModel,
    pairs: Pairs,
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
    n = len(pairs.clean_ids)
    width = model.config.hidden_size // model.config.num_attention_heads
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    at, corrupt_at, rows = pairs.positions[position], pairs.corrupt_positions[position], range(n)

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

    names = {
        (layer, head): f"model.layers.{layer}.self_attn.{receivers.component}_proj" for layer, head in receivers.heads
    }
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def store(output: Tensor) -> Tensor:
            read[name] = output.clone()
            return output

        return store

    hooked_logits(model, pairs.clean_ids, frozen, {name: keep(name) for name in set(names.values())})

    def write(name: str) -> Callable[[Tensor], Tensor]:
        def replace(output: Tensor) -> Tensor:
            output = output.clone()
            for (_, head), owner in names.items():
                if owner != name:
                    continue
                slot = head if receivers.component == Component.Q else head // group
                for row in rows:
                    output[row, at[row], slot * width : (slot + 1) * width] = read[name][
                        row, at[row], slot * width : (slot + 1) * width
                    ]
            return output

        return replace

    return hooked_logits(model, pairs.clean_ids, None, {name: write(name) for name in set(names.values())})


def walker_of(model: PreTrainedModel) -> Walker:
    with float64_softmax():
        return Walker(model)
