"""The families of decoders that can be walked: one small adapter each, see `architecture`."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.architecture import Architecture, Rotary
from stages.circuits.lora import adapter_layers
from stages.pipeline.stage import Invalid


class Llama(Architecture):
    """Llama, Qwen2 (biases on q, k and v) and Qwen3 (a norm on q and k), whose layers may have a sliding window."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.layers = self.backbone.layers
        self.mlp_width = self.config.intermediate_size

    def embed(self, input_ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
        return self.backbone.embed_tokens(input_ids)

    def rotary(self, x: Tensor, positions: Int[Tensor, "n s"]) -> list[Rotary]:
        return [_spread(*self.backbone.rotary_emb(x, positions))] * self.n_layers

    def normed(self, layer: int, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.layers[layer].input_layernorm(residual)

    def project(self, layer: int, component: str, normed: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows heads a"]:
        projected = getattr(self.layers[layer].self_attn, f"{component}_proj")(normed)
        return projected.unflatten(-1, (-1, self.head_dim))

    def place(self, layer: int, component: str, x: Float[Tensor, "n e s heads a"], rotary: Rotary) -> Tensor:
        norm = getattr(self.layers[layer].self_attn, f"{component}_norm", None)
        return super().place(layer, component, x if norm is None else norm(x), rotary)

    def scaling(self, layer: int) -> float:
        return self.layers[layer].self_attn.scaling

    def reach(self, layer: int) -> int | None:
        return getattr(self.layers[layer].self_attn, "sliding_window", None)

    def output_projection(self, layer: int) -> Any:
        return self.layers[layer].self_attn.o_proj

    def after_attention(
        self, layer: int, entering: Float[Tensor, "*#rows d"], attention: Float[Tensor, "*#rows d"]
    ) -> Float[Tensor, "*#rows d"]:
        block, middle = self.layers[layer], entering + attention
        return middle + block.mlp(block.post_attention_layernorm(middle))

    def final_norm(self, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.backbone.norm(residual)

    def head_weights(self, layer: int, head: int) -> list[Tensor]:
        attention = self.layers[layer].self_attn
        group = head // (self.n_heads // self.n_kv_heads)
        own = [(attention.q_proj, head), (attention.k_proj, group), (attention.v_proj, group)]
        parts = [(part, i) for kind in ("weight", "bias") for m, i in own if (part := getattr(m, kind)) is not None]
        q, k, v, *biases = (part.unflatten(0, (-1, self.head_dim))[index] for part, index in parts)
        return [q, k, v, attention.o_proj.weight.unflatten(1, (self.n_heads, -1))[:, head], *biases]


class Mistral(Llama):
    """Llama with one sliding window for all layers."""

    def reach(self, layer: int) -> int | None:
        return self.config.sliding_window


class Gemma2(Llama):
    """Norms on both sides of attention and MLP, scaled embeddings, soft caps, a sliding window in every other layer."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if getattr(self.config, "use_bidirectional_attention", False):
            raise Invalid("config.use_bidirectional_attention = true: only models that look back can be walked")

    def softcap(self, layer: int) -> float | None:
        return self.config.attn_logit_softcapping

    def after_attention(
        self, layer: int, entering: Float[Tensor, "*#rows d"], attention: Float[Tensor, "*#rows d"]
    ) -> Float[Tensor, "*#rows d"]:
        block = self.layers[layer]
        middle = entering + block.post_attention_layernorm(attention)
        return middle + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(middle)))

    def final_softcap(self) -> float | None:
        return self.config.final_logit_softcapping


class Gemma3(Gemma2):
    """Gemma 2 with a norm on q and k, another rotary base in layers with a window, and no soft cap on attention."""

    def rotary(self, x: Tensor, positions: Int[Tensor, "n s"]) -> list[Rotary]:
        kinds = self.config.layer_types
        tables = {kind: _spread(*self.backbone.rotary_emb(x, positions, kind)) for kind in sorted(set(kinds))}
        return [tables[kind] for kind in kinds]

    def softcap(self, layer: int) -> float | None:
        return None  # Hugging Face reads attn_logit_softcapping of a Gemma 3 config and does not apply it


class Gemma3Multimodal(Gemma3):
    """The text model inside Gemma 3 with a vision tower; prompts are text alone."""

    def text_model(self, model: Any) -> Any:
        return model.base_model.language_model

    def final_softcap(self) -> float | None:
        return None  # Hugging Face reads final_logit_softcapping of the text config and does not apply it here


class GptNeoX(Architecture):
    """GPT-NeoX and Pythia: q, k and v of a head side by side in one matrix, part of a head rotated, parallel blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.layers = self.backbone.layers
        self.mlp_width = self.config.intermediate_size

    def embed(self, input_ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
        return self.backbone.embed_in(input_ids)

    def rotary(self, x: Tensor, positions: Int[Tensor, "n s"]) -> list[Rotary]:
        return [_spread(*self.backbone.rotary_emb(x, positions))] * self.n_layers

    def normed(self, layer: int, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.layers[layer].input_layernorm(residual)

    def project(self, layer: int, component: str, normed: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows heads a"]:
        return self._fused(layer, normed)["qkv".index(component)]

    def projections(self, layer: int, normed: Float[Tensor, "*rows s d"], first: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._fused(layer, normed)
        return q[..., first:, :, :], k, v

    def _fused(self, layer: int, normed: Tensor) -> tuple[Tensor, ...]:
        fused = self.layers[layer].attention.query_key_value(normed)
        return fused.unflatten(-1, (self.n_heads, 3, self.head_dim)).unbind(-2)

    def scaling(self, layer: int) -> float:
        return self.layers[layer].attention.scaling

    def output_projection(self, layer: int) -> Any:
        return self.layers[layer].attention.dense

    def after_attention(
        self, layer: int, entering: Float[Tensor, "*#rows d"], attention: Float[Tensor, "*#rows d"]
    ) -> Float[Tensor, "*#rows d"]:
        block, middle = self.layers[layer], entering + attention
        return middle + block.mlp(block.post_attention_layernorm(entering if block.use_parallel_residual else middle))

    def final_norm(self, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.backbone.final_layer_norm(residual)

    def head_weights(self, layer: int, head: int) -> list[Tensor]:
        attention = self.layers[layer].attention
        parts = [part.unflatten(0, (self.n_heads, 3, -1))[head] for part in attention.query_key_value.parameters()]
        q, k, v, *biases = (part[index] for part in parts for index in range(3))
        return [q, k, v, attention.dense.weight.unflatten(1, (self.n_heads, -1))[:, head], *biases]


class Gpt2(Architecture):
    """GPT-2: embedded positions, all q, then all k, then all v in one transposed matrix."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.config.add_cross_attention:
            raise Invalid("config.add_cross_attention = true: only decoders without cross-attention can be walked")
        self.layers = self.backbone.h
        self.mlp_width = self.config.n_inner or 4 * self.width
        self.longest = self.config.n_positions

    def embed(self, input_ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.backbone.wte(input_ids) + self.backbone.wpe(places)

    def rotary(self, x: Tensor, positions: Int[Tensor, "n s"]) -> list[Rotary]:
        return [None] * self.n_layers

    def normed(self, layer: int, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.layers[layer].ln_1(residual)

    def project(self, layer: int, component: str, normed: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows heads a"]:
        return self._fused(layer, normed)["qkv".index(component)]

    def projections(self, layer: int, normed: Float[Tensor, "*rows s d"], first: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._fused(layer, normed)
        return q[..., first:, :, :], k, v

    def _fused(self, layer: int, normed: Tensor) -> tuple[Tensor, ...]:
        fused = self.layers[layer].attn.c_attn(normed)
        return fused.unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)

    def scaling(self, layer: int) -> float:
        return self.layers[layer].attn.scaling

    def output_projection(self, layer: int) -> Any:
        return self.layers[layer].attn.c_proj

    def attention_output(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows d"]:
        return self.output_projection(layer)(z.flatten(-2).contiguous())  # Conv1D takes a view of its input

    def output_weight(self, layer: int) -> Float[Tensor, "d outputs"]:
        return self.output_projection(layer).weight.T

    def after_attention(
        self, layer: int, entering: Float[Tensor, "*#rows d"], attention: Float[Tensor, "*#rows d"]
    ) -> Float[Tensor, "*#rows d"]:
        block, middle = self.layers[layer], entering + attention
        return middle + block.mlp(block.ln_2(middle))

    def final_norm(self, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.backbone.ln_f(residual)

    def head_weights(self, layer: int, head: int) -> list[Tensor]:
        attention = self.layers[layer].attn
        parts = [part.unflatten(-1, (3, self.n_heads, -1)) for part in (attention.c_attn.weight, attention.c_attn.bias)]
        q, k, v, *biases = (part[..., index, head, :] for part in parts for index in range(3))
        return [q, k, v, attention.c_proj.weight.unflatten(0, (self.n_heads, -1))[head], *biases]


# config.model_type -> adapter
FAMILIES: dict[str, type[Architecture]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Llama,
    "qwen3": Llama,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "gemma3": Gemma3Multimodal,
    "gpt_neox": GptNeoX,
    "gpt2": Gpt2,
}


def architecture_of(model: nn.Module) -> Architecture:
    """The adapter of a Hugging Face causal language model.

    Raises:
        Invalid: the family is not supported, there is no language-model head, LoRA layers are not merged, or dropout
            is on.
    """
    adapted = adapter_layers(model)
    if adapted:
        raise Invalid(
            f"the model has adapter layers ('{adapted[0]}'): merge them first, with stages.circuits.lora.merged"
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise Invalid(f"model type '{kind}' is not supported: must be one of {', '.join(FAMILIES)}")
    if not isinstance(model, PreTrainedModel):
        raise Invalid(f"a {type(model).__name__} is not a Hugging Face model itself: unwrap it first")
    if model.get_output_embeddings() is None:
        raise Invalid(f"{type(model).__name__} has no language-model head: must be a causal language model")
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in model.modules()):
        raise Invalid("the model is in training mode with dropout: call model.eval() first")
    return FAMILIES[kind](model)


def _spread(cos: Float[Tensor, "n s r"], sin: Float[Tensor, "n s r"]) -> Rotary:
    return cos[:, None, :, None], sin[:, None, :, None]
