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

A new family is a subclass and a line in FAMILIES (`architectures`). The walker compares itself with the model when it
is made (`load_check`), so a wrong adapter is found at once.

Shapes as in `walker`: n examples, e variants, s window slots, t positions, d residual width, h query heads, g key-value
heads, a head width.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.attention import soft_capped

# cosines and sines of window slots, [n 1 s 1 r] with r <= a rotated dimensions; None where positions are embedded
Rotary = tuple[Tensor, Tensor] | None


class Architecture(ABC):
    """A decoder's sizes and its parts, for the walker.

    Attributes:
        config: of the text model, where a model has several.
        layers: the blocks, bottom to top.
        n_layers, n_heads, n_kv_heads, head_dim, width: as named; every n_heads / n_kv_heads query heads in a row share
            a key-value head.
        mlp_width: inner width of an MLP, for counting memory.
        vocab_size: number of token ids.
        longest: most tokens that a prompt may have, where positions are embedded; None without a fixed limit.
    """

    layers: Any
    mlp_width: int
    longest: int | None = None

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.config = config
        self.backbone = self.text_model(model)
        self.head = model.get_output_embeddings()
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.width: int = config.hidden_size
        self.head_dim: int = getattr(config, "head_dim", None) or self.width // self.n_heads
        self.vocab_size: int = config.vocab_size

    def text_model(self, model: Any) -> Any:
        """The module that holds the layers and the norms."""
        return model.base_model

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
        return x if rotary is None else rotate(x, *rotary)

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

    def head_writes(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows h d"]:
        """Each head's part of `attention_output`, its bias left out."""
        weight = self.output_weight(layer).view(self.width, self.n_heads, self.head_dim)
        return torch.einsum("...ha,dha->...hd", z, weight)

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
        return soft_capped(logits, self.final_softcap())

    @abstractmethod
    def head_weights(self, layer: int, head: int) -> list[Tensor]:
        """Views of a query head's parts of q, of the k and v it reads, of the output matrix, and of q, k, v biases."""


def rotate(x: Float[Tensor, "n e s heads a"], cos: Tensor, sin: Tensor) -> Float[Tensor, "n e s heads a"]:
    """Rotary embedding of the first r of a dimensions, halves paired as Hugging Face pairs them."""
    r = cos.shape[-1]
    turned = x if r == x.shape[-1] else x[..., :r]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos).addcmul_(torch.cat([-second, first], dim=-1), sin)
    return turned if r == x.shape[-1] else torch.cat([turned, x[..., r:]], dim=-1)
