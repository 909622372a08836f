"""Exact path patching as an algorithm: how senders at k tokens of a prompt change what receivers read there, and the
logits that follow. What is kept, what fits the memory and how far a question is are `path_patching`'s.

With all heads but the senders frozen, no attention carries the change of a token to another one. So each of the k
tokens is a *chain* of token-wise maps of its own: a sweep takes the chains of all examples, for all sets of senders at
once, from layer to layer. What receivers read on the chains is then written into the clean run, of which only the
tokens from the earliest of the k on are run again: the *tail*.

Shapes: n examples, k tokens each, e sets of senders, s slots of a tail, d residual width, h query heads, a head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.circuit import Component
from stages.circuits.walker import Edit, Prefix, Walker, Window
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class Receivers:
    """Where paths end: one input of some heads, or the logits (component None, no heads)."""

    component: Component | None = None
    heads: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if (self.component is None) != (len(self.heads) == 0):
            raise Invalid(
                f"receivers {self}: must be heads with a component, or no heads and no component (the logits)"
            )

    def __str__(self) -> str:
        """E.g. "the logits", "q of 2.0, 2.3"."""
        heads = ", ".join(f"{layer}.{head}" for layer, head in self.heads)
        return "the logits" if self.component is None and not heads else f"{self.component} of {heads or 'no head'}"

    def layers(self, n_layers: int) -> list[int]:
        """Layers at whose entry they read; the logits read what leaves the last layer."""
        return [n_layers] if self.component is None else sorted({at for at, _ in self.heads})


@dataclass(frozen=True)
class Chains:
    """k tokens of each example in the clean run, and what the corrupt run changes there.

    Attributes:
        entering: clean residual stream entering each layer.
        attention: what attention gives in each layer of the clean run.
        changes: z_corrupt - z_clean.
    """

    entering: Float[Tensor, "layers n k d"]
    attention: Float[Tensor, "layers n k d"]
    changes: Float[Tensor, "layers n k h a"]

    def select(self, index: Tensor | slice) -> "Chains":
        """The same for some of the examples."""
        return Chains(self.entering[:, index], self.attention[:, index], self.changes[:, index])


@dataclass(frozen=True)
class Tails:
    """Clean runs of some examples from one position on.

    Attributes:
        slots: of the k tokens, counted from that position; on the CPU.
        length: number of slots.
        residual: layer -> clean residual stream entering it, [n s d].
        prefix: clean keys and values before that position.
    """

    slots: Int[Tensor, "n k"]
    length: int
    residual: Callable[[int], Float[Tensor, "n s d"]]
    prefix: Prefix

    def select(self, part: slice) -> "Tails":
        """The same for some of the examples."""
        prefix = Prefix(self.prefix.keys[:, part], self.prefix.values[:, part])
        return Tails(self.slots[part], self.length, lambda layer: self.residual(layer)[part], prefix)

    @property
    def window(self) -> Window:
        """Their slots, as a pass computes them."""
        keys = self.prefix.keys
        n, start = keys.shape[1], keys.shape[3]
        return Window.tail(n, start, start + self.length, keys.dtype, keys.device)


class Sweep:
    """Chains with their senders patched; grows from layer to layer as receivers ask for it.

    Args:
        walker: the model.
        chains: of some examples.
        senders: sets of senders, in order of their lowest layer.
        joined: depth -> how many of them have a sender below it.
        keep: depths whose streams are kept; None: all.
        size: (chains, sets of senders) that go through an MLP at once.
    """

    def __init__(
        self,
        walker: Walker,
        chains: Chains,
        senders: Bool[Tensor, "e layers h"],
        joined: Sequence[int],
        keep: set[int] | None,
        size: tuple[int, int],
    ) -> None:
        self.chains, self._size = chains, size
        self._walker, self._senders, self._joined, self._keep = walker, senders, joined, keep
        self._tokens = chains.attention.shape[2]
        self._entering = chains.entering.flatten(1, 2)
        self._attention = chains.attention.flatten(1, 2)
        self._changes = chains.changes.flatten(1, 2)
        self._streams = {0: self._attention[0, :, None][:, :0]}  # depth -> n*k joined d
        self._depth = 0

    def entering(self, depth: int) -> Float[Tensor, "n k e d"]:
        """What enters layer `depth` (or the final norm), for the sets of senders that have a sender below it."""
        while self._depth < depth:
            x = self._step(self._streams[self._depth])
            if self._keep is not None and self._depth not in self._keep:
                del self._streams[self._depth]
            self._depth += 1
            self._streams[self._depth] = x
        return self._streams[depth].unflatten(0, (-1, self._tokens))

    def _step(self, x: Float[Tensor, "c e d"]) -> Float[Tensor, "c f d"]:
        """From what enters a layer to what leaves it, with the senders of that layer patched."""
        layer, walker = self._depth, self._walker
        out = x.new_empty(x.shape[0], self._joined[layer + 1], x.shape[2])
        if out.shape[1] == 0:
            return out
        here = self._senders[: out.shape[1], layer]
        for few in parts(out.shape[0], self._size[0]):
            writes = walker.head_writes(layer, self._changes[layer, few])  # c h d
            entering, clean = self._entering[layer, few, None], self._attention[layer, few, None]  # c 1 d
            for sets in parts(out.shape[1], self._size[1]):
                attention = (here[sets].to(writes.dtype) @ writes).add_(clean)  # c sets d
                stream = x[few, sets]
                if new := attention.shape[1] - stream.shape[1]:  # senders that begin in this layer
                    stream = torch.cat([stream, entering.expand(-1, new, -1)], dim=1)
                out[few, sets] = walker.after_attention(layer, stream, attention)
        return out


# layer -> receiving heads (key-value heads for k and v), and what they read on each chain
Read = dict[int, tuple[Int[Tensor, "r"], Float[Tensor, "n k e r a"]]]


def read_heads(
    walker: Walker, receivers: Receivers, layer: int, residual: Float[Tensor, "n k e d"]
) -> tuple[Int[Tensor, "r"], Float[Tensor, "n k e r a"]]:
    """The `receiving_heads` of one layer, and what they read from the stream that enters it."""
    assert receivers.component is not None
    heads = receiving_heads(walker, receivers, layer)
    return heads, walker.project(layer, receivers.component, residual)[..., heads, :]


def receiving_heads(walker: Walker, receivers: Receivers, layer: int) -> Int[Tensor, "r"]:
    """The receivers of one layer: query heads for q, key-value heads for k and v."""
    heads = {head for at, head in receivers.heads if at == layer}
    if receivers.component != Component.Q:
        heads = {walker.kv_head(head) for head in heads}
    return torch.tensor(sorted(heads), device=walker.device)


def reached(walker: Walker, receivers: Receivers, joined: Sequence[int]) -> list[int]:
    """Layer -> how many sets of senders have a receiver at it or below that they reach; their tail has begun there."""
    entries = [0] * (walker.n_layers + 1)
    for layer in receivers.layers(walker.n_layers):
        entries[layer:] = [joined[layer]] * (walker.n_layers + 1 - layer)
    return entries


def tail_logits(
    walker: Walker,
    receivers: Receivers,
    read: Read,
    tails: Tails,
    entries: Sequence[int],
    part: slice,
    tokens: Int[Tensor, "n j"] | None,
) -> Float[Tensor, "n f logits"]:
    """Logits of clean runs into which is written what heads have read.

    One pass over the layers for all sets of senders: each joins at the lowest receiver that it reaches, since below
    that everything is clean.

    Args:
        read: by all sets of senders that reach a layer, see `read_heads`.
        tails: of the same examples.
        entries: see `reached`.
        part: the sets of senders that the pass carries.
        tokens: whose logits; None for all.
    """
    lowest = next(layer for layer in receivers.layers(walker.n_layers) if entries[layer] > part.start)

    def join(layer: int, x: Tensor) -> Tensor:
        more = min(entries[layer], part.stop) - part.start - x.shape[1]
        return x if more <= 0 else torch.cat([x, tails.residual(layer)[:, None].expand(-1, more, -1, -1)], dim=1)

    nothing = tails.residual(lowest)[:, None, :][:, :0]
    edit = _write(receivers.component, read, tails.slots, part)
    return walker.continue_from(tails.prefix, tails.window, nothing, lowest, edit, join, tokens)


def _write(component: Component | None, read: Read, slots: Int[Tensor, "n k"], part: slice) -> Edit:
    """An edit that writes what was read on the chains at their slots; in place, since what an edit is given was made
    for it."""
    alone = slots.shape[1] == 1  # then it is the first slot of the window

    def edit(layer: int, site: str, x: Tensor, first: int) -> Tensor:
        """first > 0: queries of the last layer at any but the last token are not used by anything."""
        if site != component or layer not in read:
            return x
        heads, values = read[layer]
        if alone:
            if first == 0:
                x[:, :, 0, heads] = values[:, 0, part]
            return x
        for token in range(slots.shape[1]):
            at = slots[:, token] - first
            which = torch.nonzero(at >= 0)[:, 0]
            if len(which):
                where = which[:, None].to(x.device), slice(None), at[which, None].to(x.device), heads
                x[where] = values[which.to(x.device), token, part].transpose(1, 2)  # n r e a
        return x

    return edit


def first_layer(senders: Bool[Tensor, "e layers h"]) -> Int[Tensor, "e"]:
    """Lowest layer with a sender; the number of layers for an empty set."""
    present = senders.any(-1)
    return torch.where(present.any(-1), present.int().argmax(-1), senders.shape[1])


def parts(total: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size`."""
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]
