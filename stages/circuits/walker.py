"""The layer walker: a Hugging Face decoder as plain functions on chosen positions.

Everything in this room rests on one fact: when only some positions of a prompt change, the other positions' keys and
values can be taken from a run that was made before. So a forward pass here has three parts:

1. a *background*: a full run (`Walker.run`) that keeps keys, values, head outputs z and the residual stream;
2. a *window*: the positions that are computed anew, for each of n examples and each of e variants of it (a variant is,
   for instance, one sender of path patching, or one circuit under evaluation);
3. an *edit*: a function that may replace q, k, v or z of any layer on the way.

`Walker.run` is the same pass with every position in the window and no background, so there is one code path to trust,
and it is checked against the Hugging Face model when a walker is made (`load_check`). What differs between families of
decoders is in `architectures`.

Shapes: n examples, e variants, s window slots, t positions, d residual width, h query heads, g key-value heads, a head
width. Window slots are in increasing position order.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stages.circuits.architecture import Rotary
from stages.circuits.architectures import architecture_of
from stages.circuits.attention import Window, attend, soft_capped
from stages.circuits.checks import Padding, check_padding, check_tokens, padding_of
from stages.circuits.load_check import check_reproduces
from stages.pipeline.stage import Invalid

KEPT = ("residual", "z", "keys", "values")  # what a run can leave behind

# edit(layer, site, x, first): site is "q", "k", "v" (as projected, see `architectures`) or "z" (head outputs); x is
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
    """What one full forward pass leaves behind; what was not to be kept has no layer.

    Attributes:
        residual: residual stream entering each layer; the last entry is what enters the final norm.
        z: head outputs before the output projection.
        keys: keys after the rotary embedding.
        values: values.
        logits: at the last position.
    """

    residual: Float[Tensor, "layers_and_one n t d"]
    z: Float[Tensor, "layers_z n t h a"]
    keys: Float[Tensor, "layers_k n g t a"]
    values: Float[Tensor, "layers_v n g t a"]
    logits: Float[Tensor, "n vocab"]

    def select(self, index: Tensor | slice) -> "Run":
        """The same run for some of its examples."""
        return Run(
            self.residual[:, index],
            self.z[:, index],
            self.keys[:, index],
            self.values[:, index],
            self.logits[index],
        )


@dataclass(frozen=True)
class AttentionInputs:
    """What attention of one layer works on: s queries against t background positions and window slots.

    Attributes:
        q, k, v: after any norm and the rotary embedding.
        sees: additive mask.
        rotary: of the window slots.
    """

    q: Float[Tensor, "n s h a"]
    k: Float[Tensor, "n t g a"]
    v: Float[Tensor, "n t g a"]
    sees: Float[Tensor, "n s t"]
    rotary: Rotary


class Walker:
    """Runs a Hugging Face decoder layer by layer.

    Attributes:
        model: the decoder.
        architecture: what is particular to its family; the sizes below are its.
        device: of the model; everything that is made for it lives there.
        pad: id of the padding token, "config" for what the model's config says (see `checks.padding_of`), None where no
            token is padding: give None to walk over prompts that start or end with that token on purpose.

    Raises:
        Invalid: the architecture is not supported, adapters are not merged, or the walker does not reproduce the
            model.
    """

    def __init__(self, model: nn.Module, pad: int | Literal["config"] | None = "config") -> None:
        self.architecture = architecture_of(model)
        self.model: Any = model
        self.pad: int | Literal["config"] | None = pad
        self.n_layers = self.architecture.n_layers
        self.n_heads = self.architecture.n_heads
        self.n_kv_heads = self.architecture.n_kv_heads
        self.head_dim = self.architecture.head_dim
        self.width = self.architecture.width
        self.mlp_width = self.architecture.mlp_width
        self.vocab_size = self.architecture.vocab_size
        self.dtype = next(model.parameters()).dtype
        self.device = next(model.parameters()).device
        self.logits_dtype = torch.promote_types(self.dtype, torch.float32)
        check_reproduces(self.model, self.architecture, self.kv_head)

    def check_prompts(self, input_ids: Int[Tensor, "n t"], what: str = "input_ids") -> None:
        """Token ids of the vocabulary, in prompts that the model can take, without padding at either end.

        Raises:
            Invalid: as said; the sentence names `what`.
        """
        check_tokens(input_ids, self.vocab_size, self.architecture.longest, what)
        padding = padding_of(self.architecture.config)
        if self.pad != "config":
            padding = Padding(self.pad, padding.begins, 1)
        check_padding(input_ids, padding.token, padding.begins, what, padding.run)

    def kv_head(self, head: int) -> int:
        """The key-value head that a query head reads from (grouped-query attention)."""
        return head // (self.n_heads // self.n_kv_heads)

    @torch.no_grad()
    def run(
        self,
        input_ids: Int[Tensor, "n t"],
        edit: Edit | None = None,
        outputs: Float[Tensor, "layers #n t h a"] | None = None,
        keep: Collection[str] = KEPT,
    ) -> Run:
        """A full forward pass over prompts of equal length, without gradients.

        Args:
            edit: as in `continue_from`.
            outputs: heads give these, and nothing attends.
            keep: which of residual, z, keys and values are kept; the others take no memory and have no layer.

        Raises:
            Invalid: a token id is outside the vocabulary, the prompts are longer than the model can take, or there is
                no such thing to keep.
        """
        check_tokens(input_ids, self.vocab_size, self.architecture.longest)
        if set(keep) - set(KEPT):
            raise Invalid(f"keep holds '{sorted(set(keep) - set(KEPT))[0]}': must be some of {', '.join(KEPT)}")
        n, length = input_ids.shape
        per_head = (n, self.n_kv_heads, length, self.head_dim)
        shapes = {
            "residual": (self.n_layers + 1, n, length, self.width),
            "z": (self.n_layers, n, length, self.n_heads, self.head_dim),
            "keys": (self.n_layers, *per_head),
            "values": (self.n_layers, *per_head),
        }
        record = {
            name: torch.empty(layers if name in keep else 0, *shape, dtype=self.dtype, device=self.device)
            for name, (layers, *shape) in shapes.items()
        }
        x = self.architecture.embed(input_ids)[:, None]
        window = Window.tail(n, 0, length, self.dtype, self.device)
        empty = torch.empty(self.n_layers, *per_head[:2], 0, self.head_dim, dtype=self.dtype, device=self.device)
        logits = self._pass(x, 0, window, empty, empty, edit, record, outputs)
        return Run(logits=logits[:, 0], **record)

    @torch.no_grad()
    def head_outputs(self, input_ids: Int[Tensor, "n t"], layers: int) -> Float[Tensor, "layers n t h a"]:
        """z of the first layers of a full forward pass, without the layers above them.

        Raises:
            Invalid: as `run`.
        """
        check_tokens(input_ids, self.vocab_size, self.architecture.longest)
        n, length = input_ids.shape
        empty = torch.empty(n, self.n_kv_heads, 0, self.head_dim, dtype=self.dtype, device=self.device)
        x = self.architecture.embed(input_ids)[:, None]
        window = Window.tail(n, 0, length, self.dtype, self.device)
        rotary = self.architecture.rotary(x, window.positions)
        found: list[Tensor] = []
        for layer in range(layers):
            if layer > 0:
                x = self.after_attention(layer - 1, x, self.attention_output(layer - 1, found[-1]))
            seen = window.within(self.architecture.reach(layer))
            found.append(self._attention(layer, x, 0, rotary[layer], seen, empty, empty, None)[2])
        return torch.stack([z[:, 0] for z in found])

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
        return self._pass(residual, layer, window, keys, values, edit, None, None, join, tokens)

    def attention_inputs(
        self, background: Run | Prefix, window: Window, residual: Float[Tensor, "n s d"], layer: int
    ) -> "AttentionInputs":
        """What attention of one layer works on when the window's residual stream enters it as given."""
        family, x = self.architecture, residual[:, None]
        rotary, seen = family.rotary(x, window.positions)[layer], window.within(family.reach(layer))
        q, k, v = family.projections(layer, family.normed(layer, x), 0)
        q, k = family.place(layer, "q", q, rotary), family.place(layer, "k", k, rotary)
        reach = window.sees_background.shape[-1]
        keys, values = (of[layer][..., :reach, :].transpose(1, 2) for of in (background.keys, background.values))
        return AttentionInputs(
            q[:, 0],
            torch.cat([keys, k[:, 0]], dim=1),
            torch.cat([values, v[:, 0]], dim=1),
            torch.cat([seen.sees_background, seen.sees_window], dim=-1),
            rotary,
        )

    def logits(
        self, residual: Float[Tensor, "n *rows d"], tokens: Int[Tensor, "n k"] | None = None
    ) -> Float[Tensor, "n *rows logits"]:
        """Final norm and language-model head, for all tokens or for k tokens of each example; at least float32, so
        that measures of logits do not round again."""
        return self.architecture.logits(residual, tokens).to(self.logits_dtype)

    def after_attention(
        self, layer: int, entering: Float[Tensor, "*#rows d"], attention: Float[Tensor, "*#rows d"]
    ) -> Float[Tensor, "*#rows d"]:
        """The residual stream that leaves a layer, given the stream that enters it and its `attention_output`.

        This is where families differ, so it is the only way from head outputs to the stream.
        """
        return self.architecture.after_attention(layer, entering, attention)

    def project(self, layer: int, component: str, residual: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows heads a"]:
        """q, k or v of a layer as the projection gives them (before any norm of q and k, and the rotary embedding),
        from the residual stream that enters the layer."""
        return self.architecture.project(layer, component, self.architecture.normed(layer, residual))

    def place(
        self, layer: int, component: str, x: Float[Tensor, "n e s heads a"], rotary: Rotary
    ) -> Float[Tensor, "n e s heads a"]:
        """Projected q or k of window slots as attention compares them."""
        return self.architecture.place(layer, component, x, rotary)

    def attention_scores(self, layer: int, products: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """Attention scores from products of queries and keys, in at least float32."""
        scaled = products.to(self.logits_dtype) * self.architecture.scaling(layer)
        return soft_capped(scaled, self.architecture.softcap(layer))

    def attention_output(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows d"]:
        """The output projection of head outputs, with its bias."""
        return self.architecture.attention_output(layer, z)

    def head_writes(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows h d"]:
        """Each head's part of `attention_output` (its bias left out)."""
        return self.architecture.head_writes(layer, z)

    def _pass(
        self,
        x: Float[Tensor, "n e s d"],
        first_layer: int,
        window: Window,
        keys: Float[Tensor, "layers n g b a"],
        values: Float[Tensor, "layers n g b a"],
        edit: Edit | None,
        record: dict[str, Tensor] | None,
        outputs: Float[Tensor, "layers #n s h a"] | None = None,
        join: Join | None = None,
        tokens: Int[Tensor, "n k"] | None = None,
    ) -> Float[Tensor, "n f logits"]:
        rotary = self.architecture.rotary(x, window.positions)
        windows: dict[int | None, Window] = {}  # for each sliding window of some layer, what slots see through it
        for layer in range(first_layer, self.n_layers):
            if join is not None:
                x = join(layer, x)
            # in the last layer only the last slot still matters, unless everything is to be recorded
            first = 0 if record is not None or layer < self.n_layers - 1 else x.shape[2] - 1
            reach = self.architecture.reach(layer)
            if reach not in windows:
                windows[reach] = window.within(reach)
            background = keys[layer], values[layer]
            given = None if outputs is None else outputs[layer][:, None].expand(*x.shape[:3], -1, -1)
            k, v, z = self._attention(layer, x, first, rotary[layer], windows[reach], *background, edit, given)
            if record is not None:
                found = {"residual": x, "z": z, "keys": k.transpose(2, 3), "values": v.transpose(2, 3)}
                for name, kept in record.items():
                    if len(kept):
                        kept[layer] = found[name][:, 0]
            x = self.after_attention(layer, x[:, :, first:], self.attention_output(layer, z))
        if record is not None and len(record["residual"]):
            record["residual"][-1] = x[:, 0]
        return self.logits(x[:, :, -1], tokens)

    def _attention(
        self,
        layer: int,
        x: Float[Tensor, "n e s d"],
        first: int,
        rotary: Rotary,
        window: Window,
        keys: Float[Tensor, "n g b a"],
        values: Float[Tensor, "n g b a"],
        edit: Edit | None,
        given: Float[Tensor, "n e s h a"] | None = None,
    ) -> tuple[Float[Tensor, "n e s g a"], Float[Tensor, "n e s g a"], Float[Tensor, "n e w h a"]]:
        """Keys, values and head outputs of one layer; head outputs only of the window slots from `first` on, and as
        they are given, if they are."""
        family = self.architecture
        q, k, v = family.projections(layer, family.normed(layer, x), first)
        if edit is not None:
            q, k, v = edit(layer, "q", q, first), edit(layer, "k", k, 0), edit(layer, "v", v, 0)
        of_queries = rotary if rotary is None else (rotary[0][:, :, first:], rotary[1][:, :, first:])
        q, k = family.place(layer, "q", q, of_queries), family.place(layer, "k", k, rotary)
        if given is not None:
            return k, v, given[:, :, first:]
        seen = window.sees_background[:, first:], window.sees_window[:, first:]
        z = attend(q, k, v, keys, values, *seen, family.scaling(layer), family.softcap(layer))
        return k, v, z if edit is None else edit(layer, "z", z, first)
