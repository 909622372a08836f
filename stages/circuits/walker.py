"""The layer walker: a Hugging Face decoder as plain functions on chosen positions.

Everything in this room rests on one fact: when only some positions of a prompt change, the other positions' keys and
values can be taken from a run that was made before. So a forward pass here has three parts:

1. a *background*: a full run (`Walker.run`) that keeps keys, values, head outputs z and the residual stream;
2. a *window*: the positions that are computed anew, for each of n examples and each of e variants of it (a variant is,
   for instance, one sender of path patching, or one circuit under evaluation);
3. an *edit*: a function that may replace q, k, v or z of any layer on the way.

`Walker.run` is the same pass with every position in the window and no background, so there is one code path to trust,
and it is checked against the Hugging Face model when a walker is made. What differs between families of decoders is in
`architectures`.

Shapes: n examples, e variants, s window slots, t positions, d residual width, h query heads, g key-value heads, a head
width. Window slots are in increasing position order.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stages.circuits.architectures import Rotary, architecture_of
from stages.circuits.checks import check_tokens
from stages.circuits.trace import Trace
from stages.pipeline.stage import Invalid

# From so many queries on the fused kernel pays for copying the background; on a processor it is then up to 2.5 times as
# fast, since it writes no attention scores to memory.
FUSED_SLOTS = 16

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
    """What one full forward pass leaves behind.

    Attributes:
        residual: residual stream entering each layer; the last entry is what enters the final norm.
        z: head outputs before the output projection.
        keys: keys after the rotary embedding.
        values: values.
        logits: at the last position.
    """

    residual: Float[Tensor, "depths n t d"]
    z: Float[Tensor, "layers n t h a"]
    keys: Float[Tensor, "layers n g t a"]
    values: Float[Tensor, "layers n g t a"]
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
        # a padding slot sees itself, so that its softmax is defined
        visible |= torch.eye(s, dtype=torch.bool, device=device)
        return Window(positions, background, _mask(visible, dtype))

    def within(self, reach: int | None) -> "Window":
        """The same slots when each sees only the `reach` tokens up to itself (a sliding window; None: all)."""
        if reach is None or int(self.positions.max()) < reach:
            return self
        places = torch.arange(self.sees_background.shape[-1], device=self.positions.device)
        far_background = self.positions[:, :, None] - places >= reach
        far_window = self.positions[:, :, None] - self.positions[:, None, :] >= reach
        return Window(
            self.positions,
            self.sees_background.masked_fill(far_background, float("-inf")),
            self.sees_window.masked_fill(far_window, float("-inf")),
        )


class Walker:
    """Runs a Hugging Face decoder layer by layer.

    Attributes:
        model: the decoder.
        architecture: what is particular to its family; the sizes below are its.

    Raises:
        Invalid: the architecture is not supported, adapters are not merged, or the walker does not reproduce the
            model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.architecture = architecture_of(model)
        self.model: Any = model
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
        self._check()

    def kv_head(self, head: int) -> int:
        """The key-value head that a query head reads from (grouped-query attention)."""
        return head // (self.n_heads // self.n_kv_heads)

    def run(
        self,
        input_ids: Int[Tensor, "n t"],
        edit: Edit | None = None,
        outputs: Float[Tensor, "layers #n t h a"] | None = None,
    ) -> Run:
        """A full forward pass over prompts of equal length. With `outputs` heads give these, and nothing attends.

        Raises:
            Invalid: a token id is outside the vocabulary, or the prompts are longer than the model can take.
        """
        check_tokens(input_ids, self.vocab_size, self.architecture.longest)
        n, length = input_ids.shape
        empty = torch.empty(self.n_layers, n, self.n_kv_heads, 0, self.head_dim, dtype=self.dtype, device=self.device)
        record: dict[str, list[Tensor]] = {name: [] for name in ("residual", "z", "keys", "values")}
        x = self.architecture.embed(input_ids)[:, None]
        logits = self._pass(
            x, 0, Window.tail(n, 0, length, self.dtype, self.device), empty, empty, edit, record, outputs
        )
        stacked = {name: torch.stack([entry[:, 0] for entry in entries]) for name, entries in record.items()}
        return Run(logits=logits[:, 0], **stacked)

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

    def attention_output(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows d"]:
        """The output projection of head outputs, with its bias."""
        return self.architecture.attention_output(layer, z)

    def head_writes(self, layer: int, z: Float[Tensor, "*rows h a"]) -> Float[Tensor, "*rows h d"]:
        """Each head's part of `attention_output` (its bias left out)."""
        weight = self.architecture.output_weight(layer).view(self.width, self.n_heads, self.head_dim)
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
                record["residual"].append(x)
                record["z"].append(z)
                record["keys"].append(k.transpose(2, 3))
                record["values"].append(v.transpose(2, 3))
            x = self.after_attention(layer, x[:, :, first:], self.attention_output(layer, z))
        if record is not None:
            record["residual"].append(x)
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
        z = _attend(q, k, v, keys, values, *seen, family.scaling(layer), family.softcap(layer))
        return k, v, z if edit is None else edit(layer, "z", z, first)

    @torch.no_grad()
    def _check(self) -> None:
        """Compare logits and head outputs with the Hugging Face model on random prompts, and see which key-value head
        each query head follows."""
        generator = torch.Generator("cpu").manual_seed(0)
        length = min(12, self.architecture.longest or 12)
        ids = torch.randint(0, self.vocab_size, (2, length), generator=generator, device="cpu").to(self.device)
        ours = self.run(ids)
        theirs, z, whole = self._hugging_face(ids)
        tolerance = 5e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-4
        error = _relative_error(ours.logits, theirs)
        if not error <= tolerance:
            raise Invalid(f"the walker does not reproduce this model: logits differ by {error:.1e} of their maximum")
        for layer in range(self.n_layers):
            bias = self.architecture.output_projection(layer).bias
            parts = self.head_writes(layer, ours.z[layer]).sum(-2) + (0 if bias is None else bias)
            error = max(_relative_error(ours.z[layer].flatten(-2), z[layer]), _relative_error(parts, whole[layer]))
            if not error <= tolerance:
                raise Invalid(
                    f"head outputs do not add up to the attention output of layer {layer} of this model (they differ "
                    f"by {error:.1e} of its maximum)"
                )
        self._check_heads(ids[:1])

    def _hugging_face(self, ids: Int[Tensor, "n t"]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The model's own logits at the last position, and what enters and leaves its output projections."""
        with ExitStack() as stack:
            traces = [
                stack.enter_context(Trace(self.architecture.output_projection(layer), retain_input=True))
                for layer in range(self.n_layers)
            ]
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits, [trace.input for trace in traces], [trace.output for trace in traces]

    def _check_heads(self, ids: Int[Tensor, "1 t"]) -> None:
        """Move the values of one key-value head at a time: just the query heads that `kv_head` names must follow."""
        x = self.architecture.embed(ids)[:, None].expand(-1, 1 + self.n_kv_heads, -1, -1)
        window = Window.tail(1, 0, ids.shape[1], self.dtype, self.device)
        empty = torch.empty(1, self.n_kv_heads, 0, self.head_dim, dtype=self.dtype, device=self.device)

        def shift(layer: int, site: str, values: Tensor, first: int) -> Tensor:
            moved = torch.eye(1 + self.n_kv_heads, dtype=values.dtype, device=self.device)[:, None, 1:, None]
            return values + moved if site == "v" else values

        _, _, z = self._attention(
            0, x, 0, self.architecture.rotary(x, window.positions)[0], window, empty, empty, shift
        )
        follows = ((z[0, 1:] - z[0, :1]).abs().amax((1, 3)) > 0.1).cpu()  # g h; a value moves by 1
        shared = [[self.kv_head(h) == g for h in range(self.n_heads)] for g in range(self.n_kv_heads)]
        expected = torch.tensor(shared, device="cpu")
        if not torch.equal(follows, expected):
            raise Invalid("query heads of this model do not share key-value heads in consecutive groups of equal size")


def _attend(
    q: Float[Tensor, "n e s h a"],
    k: Float[Tensor, "n e w g a"],
    v: Float[Tensor, "n e w g a"],
    background_keys: Float[Tensor, "n g b a"],
    background_values: Float[Tensor, "n g b a"],
    sees_background: Float[Tensor, "n s b"],
    sees_window: Float[Tensor, "n s w"],
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "n e s h a"]:
    """Attention of s queries to b background positions and w window slots; background keys are shared by variants."""
    n, e, s, h, a = q.shape
    w, g = k.shape[2], k.shape[3]
    b = background_keys.shape[2]
    if q.device.type == "cpu" and softcap is None and s >= FUSED_SLOTS:
        return _attend_fused(q, k, v, background_keys, background_values, sees_background, sees_window, scaling)
    r = h // g  # query heads per key-value head
    rows, all_rows = (n * g, e * s * r), (n * g * e, s * r)  # of one background, of one variant
    q = (q * scaling).reshape(n, e, s, g, r, a).permute(0, 3, 1, 2, 4, 5).reshape(*rows, a)
    k, v = (x.permute(0, 3, 1, 2, 4).reshape(n * g * e, w, a) for x in (k, v))
    to_background = torch.bmm(q, background_keys.reshape(n * g, b, a).transpose(1, 2)).view(n, g, e, s, r, b)
    to_window = torch.bmm(q.reshape(*all_rows, a), k.transpose(1, 2)).view(n, g, e, s, r, w)
    scores = torch.cat([to_background, to_window], dim=-1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + torch.cat([sees_background, sees_window], dim=-1)[:, None, None, :, None]
    # softmax in at least float32, as Hugging Face's eager attention does
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    z = torch.bmm(weights.reshape(*all_rows, b + w)[..., b:], v).view(*rows, a)
    z = torch.baddbmm(z, weights.reshape(*rows, b + w)[..., :b], background_values.reshape(n * g, b, a))
    return z.reshape(n, g, e, s, r, a).permute(0, 2, 3, 1, 4, 5).reshape(n, e, s, h, a)


def _attend_fused(
    q: Float[Tensor, "n e s h a"],
    k: Float[Tensor, "n e w g a"],
    v: Float[Tensor, "n e w g a"],
    background_keys: Float[Tensor, "n g b a"],
    background_values: Float[Tensor, "n g b a"],
    sees_background: Float[Tensor, "n s b"],
    sees_window: Float[Tensor, "n s w"],
    scaling: float,
) -> Float[Tensor, "n e s h a"]:
    """The same by torch's fused kernel: no tensor of scores, but a copy of the background for every variant."""
    n, e, s, h, a = q.shape

    def seen(background: Float[Tensor, "n g b a"], window: Float[Tensor, "n e w g a"]) -> Float[Tensor, "m g t a"]:
        window = window.transpose(2, 3)
        return torch.cat([background[:, None].expand(-1, e, -1, -1, -1), window], dim=3).flatten(0, 1)

    k, v = seen(background_keys, k), seen(background_values, v)
    mask = torch.cat([sees_background, sees_window], dim=-1)[:, None, None].expand(-1, e, -1, -1, -1).flatten(0, 1)
    q = q.transpose(2, 3).flatten(0, 1)
    z = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=h != k.shape[1])
    return z.transpose(1, 2).reshape(n, e, s, h, a)


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((ours - theirs).abs().max()) / (float(theirs.abs().max()) + 1e-6)


def _mask(visible: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
