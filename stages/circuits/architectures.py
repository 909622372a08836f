"""What the walker needs to know of each family of decoders: one small adapter a family.

An adapter calls the Hugging Face modules as they are and answers small questions about them. The walker takes a block
of any family through the same steps:

1. `normed`: the norm in front of attention;
2. `project`: q, k and v of every head. Here they are read and patched: straight after the projection with its bias,
   before any norm on q and k (Qwen3, Gemma 3) and before the rotary embedding. Both act on one head at one token, so
   replacing a head's slice before them or after them is the same;
3. `place`: the norm on q and k, where there is one, and the rotary embedding;
4. attention with the family's `scaling`, `softcap` and `reach` (sliding window): head outputs z;
5. `attention_output`: the output projection. This, and only this, is linear in the heads: `head_writes` are its parts;
6. `after_attention`: the rest of the block, from the stream that enters it and the output projection's output. Gemma
   puts a norm between that output and the stream, so a change of a head is not added to the stream as it is; in the
   parallel block of GPT-NeoX the MLP reads the stream that enters, so a head does not feed the MLP of its own layer.

A new family is a subclass and a line in FAMILIES. The walker compares itself with the model when it is made, so a wrong
adapter is found at once.

Shapes as in `walker`: n examples, e variants, s window slots, t positions, d residual width, h query heads, g key-value
heads, a head width.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.lora import adapter_layers
from stages.pipeline.stage import Invalid

# cosines and sines of window slots, [n 1 s 1 r] with r <= a rotated dimensions; None where positions are embedded
Rotary = tuple[Tensor, Tensor] | None


class Architecture(ABC):
    """A decoder's sizes and its parts, for the walker.

    Attributes:
        n_layers, n_heads, n_kv_heads, head_dim, width: as named; every n_heads / n_kv_heads query heads in a row share
            a key-value head.
        mlp_width: inner width of an MLP, for counting memory.
        vocab_size: number of token ids.
        longest: most tokens that a prompt may have; None without a fixed limit.
    """

    layers: Any
    mlp_width: int
    longest: int | None = None

    def __init__(self, model: Any) -> None:
        config = model.config
        self.config = config
        self.backbone = model.base_model
        self.head = model.get_output_embeddings()
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.width: int = config.hidden_size
        self.head_dim: int = getattr(config, "head_dim", None) or self.width // self.n_heads
        self.vocab_size: int = config.vocab_size

    @abstractmethod
    def embed(self, input_ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
        """What enters the first layer."""

    @abstractmethod
    def rotary(self, x: Tensor, positions: Int[Tensor, "n s"]) -> list[Rotary]:
        """The rotary embedding of window slots in every layer; x gives the dtype."""

    @abstractmethod
    def normed(self, layer: int, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """What the projections of a layer read."""

    @abstractmethod
    def project(self, layer: int, component: str, normed: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows heads a"]:
        """q, k or v, see step 2."""

    def projections(self, layer: int, normed: Float[Tensor, "*rows s d"], first: int) -> tuple[Tensor, Tensor, Tensor]:
        """q of the slots from `first` on, k and v of all slots."""
        q = self.project(layer, "q", normed[..., first:, :])
        return q, self.project(layer, "k", normed), self.project(layer, "v", normed)

    def place(self, layer: int, component: str, x: Float[Tensor, "n e s heads a"], rotary: Rotary) -> Tensor:
        """q or k as attention compares them."""
        return x if rotary is None else _rotate(x, *rotary)

    @abstractmethod
    def scaling(self, layer: int) -> float:
        """Factor on the products of queries and keys."""

    def softcap(self, layer: int) -> float | None:
        """Attention scores x become softcap * tanh(x / softcap)."""
        return None

    def reach(self, layer: int) -> int | None:
        """How many tokens a query sees, itself included; None for all before it."""
        return None

    @abstractmethod
    def output_projection(self, layer: int) -> Any:
        """The module that turns the head outputs of a layer, side by side, into what attention gives."""

    def attention_output(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows d"]:
        """What that module gives, with its bias."""
        return self.output_projection(layer)(z.flatten(-2))

    def output_weight(self, layer: int) -> Float[Tensor, "d outputs"]:
        """Its matrix."""
        return self.output_projection(layer).weight

    @abstractmethod
    def after_attention(
        self, layer: int, entering: Float[Tensor, "*#rows d"], attention: Float[Tensor, "*#rows d"]
    ) -> Float[Tensor, "*#rows d"]:
        """The stream that leaves a layer, see step 6. The two inputs may differ by dimensions of size 1."""

    @abstractmethod
    def final_norm(self, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """What the language-model head reads."""

    def final_softcap(self) -> float | None:
        """Logits x become softcap * tanh(x / softcap)."""
        return None

    def logits(
        self, residual: Float[Tensor, "n *rows d"], tokens: Int[Tensor, "n k"] | None = None
    ) -> Float[Tensor, "n *rows logits"]:
        """Final norm and language-model head, for all tokens or, in at least float32, for k tokens of each example."""
        normed = self.final_norm(residual)
        if tokens is None:
            logits = self.head(normed)
        else:
            exact = torch.promote_types(torch.float32, normed.dtype)
            logits = torch.einsum("n...d,nkd->n...k", normed.to(exact), self.head.weight[tokens].to(exact))
            if self.head.bias is not None:
                bias = self.head.bias[tokens].to(exact)
                logits = logits + bias.view(len(bias), *[1] * (logits.ndim - 2), -1)
        cap = self.final_softcap()
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @abstractmethod
    def head_weights(self, layer: int, head: int) -> list[Tensor]:
        """Views of a query head's parts of q, of the k and v it reads, of the output matrix, and of q, k, v biases."""


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


def _rotate(x: Float[Tensor, "n e s heads a"], cos: Tensor, sin: Tensor) -> Float[Tensor, "n e s heads a"]:
    """Rotary embedding of the first r of a dimensions, halves paired as Hugging Face pairs them."""
    r = cos.shape[-1]
    turned = x if r == x.shape[-1] else x[..., :r]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos).addcmul_(torch.cat([-second, first], dim=-1), sin)
    return turned if r == x.shape[-1] else torch.cat([turned, x[..., r:]], dim=-1)
