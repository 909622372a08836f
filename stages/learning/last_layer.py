"""The last decoder layer at the last tokens alone, for training and probes by the answer's token.

Every loss and every probe here is at the end of a sequence. What the last layer computes at an earlier position
reaches neither: only its keys and values there are attended to. So queries, attention, output projection and MLP of
that layer are computed for the last tokens only, which saves about an eighth of a step of six layers. Logits at the
end and gradients are the same; earlier logits are meaningless.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, rotate_half


@contextmanager
def last_layer_at_the_end(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Inside, sequences are of equal length without padding, and only logits at the last `tokens` count.

    Decoder layers of other kinds than Llama's stay as they are.
    """
    layers = getattr(model.base_model, "layers", None)
    layer = layers[-1] if isinstance(layers, torch.nn.ModuleList) else None
    if not (isinstance(layer, LlamaDecoderLayer) and type(layer.self_attn) is LlamaAttention):
        yield
        return
    vars(layer)["forward"] = partial(_forward, layer, tokens)  # before that of the class
    try:
        yield
    finally:
        del vars(layer)["forward"]


def _forward(
    layer: LlamaDecoderLayer,
    tokens: int,
    hidden_states: Float[Tensor, "n t d"],
    *,
    position_embeddings: tuple[Float[Tensor, "b t a"], Float[Tensor, "b t a"]],
    past_key_values: Any = None,
    **_: Any,
) -> Float[Tensor, "n t d"]:
    attention, length = layer.self_attn, hidden_states.shape[1]
    start = max(0, length - tokens)
    normed = layer.input_layernorm(hidden_states)
    cos, sin = (part[:, None] for part in position_embeddings)

    def heads(projected: Tensor) -> Float[Tensor, "n heads t a"]:
        return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = heads(attention.q_proj(normed[:, start:]))
    query = query * cos[:, :, start:] + rotate_half(query) * sin[:, :, start:]
    key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    key = key * cos + rotate_half(key) * sin
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    # queries of one key-value head together
    query = query.unflatten(1, (-1, attention.num_key_value_groups))
    scores = torch.einsum("nhgqa,nhka->nhgqk", query * attention.scaling, key)
    allowed = torch.ones(length - start, length, dtype=torch.bool, device=scores.device).tril(start)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    mixed = torch.einsum("nhgqk,nhka->nqhga", weights, value).flatten(2)
    end = hidden_states[:, start:] + attention.o_proj(mixed)
    end = end + layer.mlp(layer.post_attention_layernorm(end))
    return torch.nn.functional.pad(end, (0, 0, start, 0))
