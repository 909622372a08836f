"""The layer walker: a Hugging Face decoder as plain functions on chosen positions.

Everything in this room rests on one fact: when only some positions of a prompt change, the other positions' keys and
values can be taken from a run that was made before. So a forward pass here has three parts:

1. a *background*: a full run (`Walker.run`) that keeps keys, values, head outputs z and the residual stream;
2. a *window*: the positions that are computed anew, for each of n examples and each of e variants of it (a variant is,
   for instance, one sender of path patching, or one circuit under evaluation);
3. an *edit*: a function that may replace q, k, v or z of any layer on the way.

`Walker.run` is the same pass with every position in the window and no background, so there is one code path to trust,
and it is checked against the Hugging Face model when a walker is made.

Shapes: n examples, e variants, s window slots, t positions, d residual width, h query heads, g key-value heads, a head
width. Window slots are in increasing position order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from stages.pipeline.stage import Invalid

SUPPORTED = ("llama", "mistral", "qwen2")

# edit(layer, site, x, first): site is "q", "k", "v" (before the rotary embedding) or "z" (head outputs); x is
# [n e s' heads a], and covers the window slots from `first` on. Returns the replacement, same shape.
Edit = Callable[[int, str, Tensor, int], Tensor]

# join(layer, x): x is what enters the layer, [n e s d]. Returns it with the variants that begin there appended.
Join = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Prefix:
    """The part of a background that a window sees.

    Attributes:
        keys: keys after the rotary embedding.
        values: values.
    """

    keys: Float[Tensor, "layers n g b a"]
    values: Float[Tensor, "layers n g b a"]


@dataclass(frozen=True)
class Run:
    """What one full forward pass leaves behind.

    Attributes:
        residual: residual stream entering each layer; the last entry is what enters the final norm.
        middle: residual stream after each layer's attention, before its MLP.
        z: head outputs before o_proj.
        keys: keys after the rotary embedding.
        values: values.
        logits: at the last position.
    """

    residual: Float[Tensor, "depths n t d"]
    middle: Float[Tensor, "layers n t d"]
    z: Float[Tensor, "layers n t h a"]
    keys: Float[Tensor, "layers n g t a"]
    values: Float[Tensor, "layers n g t a"]
    logits: Float[Tensor, "n vocab"]

    def select(self, index: Tensor | slice) -> "Run":
        """The same run for some of its examples."""
        return Run(
            self.residual[:, index],
            self.middle[:, index],
            self.z[:, index],
            self.keys[:, index],
            self.values[:, index],
            self.logits[index],
        )


@dataclass(frozen=True)
class Window:
    """The positions that a pass computes, and what they can see.

    Attributes:
        positions: window slots, increasing along s.
        sees_background: additive mask, 0 where a slot attends to a background position, -inf elsewhere.
        sees_window: additive mask between window slots.
    """

    positions: Int[Tensor, "n s"]
    sees_background: Float[Tensor, "n s b"]
    sees_window: Float[Tensor, "n s s"]

    @staticmethod
    def tail(
        n: int,
        start: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> "Window":
        """All positions from `start` to the last; the background is the prefix before `start`."""
        slots = torch.arange(start, length, device=device).expand(n, length - start)
        causal = _mask(slots[:, None, :] <= slots[:, :, None], dtype)
        return Window(slots, torch.zeros(n, length - start, start, dtype=dtype, device=device), causal)

    @staticmethod
    def scattered(
        positions: Int[Tensor, "n s"],
        length: int,
        live: Bool[Tensor, "n s"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Window":
        """Any positions, increasing along s; every other position of the prompt is background.

        Args:
            positions: a position may be repeated only in slots that are not live.
            length: number of positions t of the prompt.
            live: slots that count; a slot that is not live (padding) is computed, but nothing attends to it.
        """
        (n, s), device = positions.shape, positions.device
        live = torch.ones(n, s, dtype=torch.bool, device=device) if live is None else live
        in_window = torch.zeros(n, length, dtype=torch.bool, device=device)
        rows = torch.arange(n, device=device)[:, None].expand(n, s)
        in_window[rows[live], positions[live]] = True
        everywhere = torch.arange(length, device=device)
        earlier = everywhere[None, None, :] <= positions[:, :, None]
        background = _mask(earlier & ~in_window[:, None, :], dtype)
        visible = (positions[:, None, :] <= positions[:, :, None]) & live[:, None, :]
        visible |= torch.eye(
            s, dtype=torch.bool, device=device
        )  # a padding slot sees itself, so that its softmax is defined
        return Window(positions, background, _mask(visible, dtype))


class Walker:
    """Runs a Hugging Face decoder layer by layer.

    Raises:
        Invalid: the architecture is not supported, or the walker does not reproduce the model's logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        if config.model_type not in SUPPORTED:
            raise Invalid(f"model type '{config.model_type}' is not supported: must be one of {', '.join(SUPPORTED)}")
        self.model = model
        self.layers = model.model.layers
        self.n_layers = config.num_hidden_layers
        self.n_heads = config.num_attention_heads
        self.n_kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.width = config.hidden_size
        self.dtype = next(model.parameters()).dtype
        self.device = next(model.parameters()).device
        self._check()

    def kv_head(self, head: int) -> int:
        """The key-value head that a query head reads from (grouped-query attention)."""
        return head // (self.n_heads // self.n_kv_heads)

    def run(self, input_ids: Int[Tensor, "n t"], edit: Edit | None = None) -> Run:
        """A full forward pass over prompts of equal length."""
        n, length = input_ids.shape
        empty = torch.empty(self.n_layers, n, self.n_kv_heads, 0, self.head_dim, dtype=self.dtype, device=self.device)
        record: dict[str, list[Tensor]] = {name: [] for name in ("residual", "middle", "z", "keys", "values")}
        x = self.model.model.embed_tokens(input_ids)[:, None]
        logits = self._pass(x, 0, Window.tail(n, 0, length, self.dtype, self.device), empty, empty, edit, record)
        stacked = {name: torch.stack([entry[:, 0] for entry in entries]) for name, entries in record.items()}
        return Run(logits=logits[:, 0], **stacked)

    def continue_from(
        self,
        background: Run | Prefix,
        window: Window,
        residual: Float[Tensor, "n e s d"],
        layer: int,
        edit: Edit | None = None,
        join: Join | None = None,
        tokens: Int[Tensor, "n k"] | None = None,
    ) -> Float[Tensor, "n f logits"]:
        """Logits at the last position when the window's residual stream enters `layer` as given.

        Positions outside the window keep the keys and values of `background`. The last window slot must be the last
        position of the prompt. In the last layer only that slot is computed, so `edit` is called there with q and z
        of one slot. With `join`, further variants may begin at `layer` or above it. With `tokens`, logits are of those
        tokens of each example only.
        """
        reach = window.sees_background.shape[-1]
        keys, values = background.keys[..., :reach, :], background.values[..., :reach, :]
        return self._pass(residual, layer, window, keys, values, edit, None, join, tokens)

    def logits(
        self, residual: Float[Tensor, "n *rows d"], tokens: Int[Tensor, "n k"] | None = None
    ) -> Float[Tensor, "n *rows logits"]:
        """Final norm and language-model head, for all tokens or, in at least float32, for k tokens of each example."""
        normed = self.model.model.norm(residual)
        if tokens is None:
            return self.model.lm_head(normed)
        exact = torch.promote_types(torch.float32, self.dtype)
        return torch.einsum("n...d,nkd->n...k", normed.to(exact), self.model.lm_head.weight[tokens].to(exact))

    def mlp(self, layer: int, middle: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The residual stream after a layer's MLP, given the stream before it."""
        block = self.layers[layer]
        return middle + block.mlp(block.post_attention_layernorm(middle))

    def project(self, layer: int, component: str, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows heads a"]:
        """q, k or v of a layer (before the rotary embedding) from the residual stream that enters the layer."""
        block = self.layers[layer]
        projected = getattr(block.self_attn, f"{component}_proj")(block.input_layernorm(residual))
        return projected.unflatten(-1, (-1, self.head_dim))

    def attention_output(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows d"]:
        """o_proj of head outputs."""
        return self.layers[layer].self_attn.o_proj(z.flatten(-2))

    def head_writes(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows h d"]:
        """What each head alone adds to the residual stream (without the bias of o_proj)."""
        weight = self.layers[layer].self_attn.o_proj.weight.view(self.width, self.n_heads, self.head_dim)
        return torch.einsum("...ha,dha->...hd", z, weight)

    def _pass(
        self,
        x: Float[Tensor, "n e s d"],
        first_layer: int,
        window: Window,
        keys: Float[Tensor, "layers n g b a"],
        values: Float[Tensor, "layers n g b a"],
        edit: Edit | None,
        record: dict[str, list[Tensor]] | None,
        join: Join | None = None,
        tokens: Int[Tensor, "n k"] | None = None,
    ) -> Float[Tensor, "n f logits"]:
        cos, sin = self.model.model.rotary_emb(x, window.positions)  # [n s a]
        cos, sin = cos[:, None, :, None], sin[:, None, :, None]
        for layer in range(first_layer, self.n_layers):
            if join is not None:
                x = join(layer, x)
            # in the last layer only the last slot still matters, unless everything is to be recorded
            first = 0 if record is not None or layer < self.n_layers - 1 else x.shape[2] - 1
            normed = self.layers[layer].input_layernorm(x)
            attention = self.layers[layer].self_attn
            q = attention.q_proj(normed[:, :, first:]).unflatten(-1, (-1, self.head_dim))
            k = attention.k_proj(normed).unflatten(-1, (-1, self.head_dim))
            v = attention.v_proj(normed).unflatten(-1, (-1, self.head_dim))
            if edit is not None:
                q, k, v = edit(layer, "q", q, first), edit(layer, "k", k, 0), edit(layer, "v", v, 0)
            q = q * cos[:, :, first:] + _rotate_half(q) * sin[:, :, first:]
            k = k * cos + _rotate_half(k) * sin
            z = _attend(
                q,
                k,
                v,
                keys[layer],
                values[layer],
                window.sees_background[:, first:],
                window.sees_window[:, first:],
                attention.scaling,
            )
            if edit is not None:
                z = edit(layer, "z", z, first)
            if record is not None:
                record["residual"].append(x)
                record["z"].append(z)
                record["keys"].append(k.transpose(2, 3))
                record["values"].append(v.transpose(2, 3))
            middle = x[:, :, first:] + self.attention_output(layer, z)
            x = self.mlp(layer, middle)
            if record is not None:
                record["middle"].append(middle)
        if record is not None:
            record["residual"].append(x)
        return self.logits(x[:, :, -1], tokens)

    @torch.no_grad()
    def _check(self) -> None:
        """Compare logits, and the sum of head outputs, with the Hugging Face model on a random prompt."""
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(0, self.model.config.vocab_size, (2, 12), generator=generator, device="cpu").to(self.device)
        ours = self.run(ids)
        theirs = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        scale = float(theirs.abs().max()) + 1e-6
        error = float((ours.logits - theirs).abs().max()) / scale
        tolerance = 2e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if not error <= tolerance:
            raise Invalid(f"the walker does not reproduce this model: logits differ by {error:.1e} of their maximum")
        whole = self.attention_output(0, ours.z[0])
        bias = self.layers[0].self_attn.o_proj.bias
        parts = self.head_writes(0, ours.z[0]).sum(-2) + (0 if bias is None else bias)
        error = float((whole - parts).abs().max()) / (float(whole.abs().max()) + 1e-6)
        if not error <= tolerance:
            raise Invalid(f"head outputs do not add up to the attention output of this model (error {error:.1e})")


def _attend(
    q: Float[Tensor, "n e s h a"],
    k: Float[Tensor, "n e w g a"],
    v: Float[Tensor, "n e w g a"],
    background_keys: Float[Tensor, "n g b a"],
    background_values: Float[Tensor, "n g b a"],
    sees_background: Float[Tensor, "n s b"],
    sees_window: Float[Tensor, "n s w"],
    scaling: float,
) -> Float[Tensor, "n e s h a"]:
    """Attention of s queries to b background positions and w window slots; background keys are shared by variants."""
    n, e, s, h, a = q.shape
    w, g = k.shape[2], k.shape[3]
    b = background_keys.shape[2]
    r = h // g  # query heads per key-value head
    rows, all_rows = (n * g, e * s * r), (n * g * e, s * r)  # of one background, of one variant
    q = (q * scaling).reshape(n, e, s, g, r, a).permute(0, 3, 1, 2, 4, 5).reshape(*rows, a)
    k, v = (x.permute(0, 3, 1, 2, 4).reshape(n * g * e, w, a) for x in (k, v))
    to_background = torch.bmm(q, background_keys.reshape(n * g, b, a).transpose(1, 2)).view(n, g, e, s, r, b)
    to_window = torch.bmm(q.reshape(*all_rows, a), k.transpose(1, 2)).view(n, g, e, s, r, w)
    scores = torch.cat([to_background, to_window], dim=-1)
    scores += torch.cat([sees_background, sees_window], dim=-1)[:, None, None, :, None]
    # softmax in at least float32, as Hugging Face's eager attention does
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    z = torch.bmm(weights.reshape(*all_rows, b + w)[..., b:], v).view(*rows, a)
    z = torch.baddbmm(z, weights.reshape(*rows, b + w)[..., :b], background_values.reshape(n * g, b, a))
    return z.reshape(n, g, e, s, r, a).permute(0, 2, 3, 1, 4, 5).reshape(n, e, s, h, a)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _mask(visible: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
