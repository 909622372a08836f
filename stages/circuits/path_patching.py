"""Path patching, exact and local to one position.

Definition (Wang et al. 2022, section 3.1; Prakash et al. 2024, section 3). Sender heads at position p take
their corrupt outputs; every other head output is frozen at its clean value; MLPs and norms are recomputed.
What the receivers then read at p (the logits, or q / k / v of chosen heads) is written into a second clean
run, in which everything downstream is free. The effect is the change of a measure of that second run's
logits.

Algorithm. With all other heads frozen no attention can carry the change away from p, so the first run is a
chain of token-wise maps at one position:

1. one clean and one corrupt run of every prompt;
2. the sweep: one pass over the layers carries one position for all senders at once. A sender joins at its own
   layer with `clean attention output + W_O (z_corrupt - z_clean)`, goes through the rest of the block, and then
   from layer to layer with the clean attention outputs. The residual stream that enters each receiving layer is
   kept;
3. logits receivers: final norm and head of those rows. q / k / v receivers: project those rows, write the
   receivers' slices at p, and run only positions p..last and only layers from the lowest receiver above the
   sender on; the prefix keeps its clean keys and values.

The sweep does not depend on the receivers, so receivers that are asked for together share it. Senders at or
above the highest receiver have an effect of exactly 0 and are not run.

Validity: any decoder with token-wise norms and MLPs, whose families `architectures` lists; blocks with a norm after
attention and parallel blocks are exact too, since the sweep takes each layer whole. Queries and keys are patched as
they are projected, before any norm on them and the rotary embedding. With grouped queries a k / v receiver is the
key-value head that the head reads from. LoRA adapters must be merged first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.checks import check_finite, check_heads, check_name, check_padding, check_positions, check_tokens
from stages.circuits.types import Component
from stages.circuits.walker import Edit, Run, Walker, Window
from stages.pipeline.stage import Invalid

# Rows are cut so that the tensors of a layer stay near the processor's cache; larger parts are slower.
WORKING_MIB = 32

# measure(logits [n e vocab], index [n]) -> [n e]: one number for each patched run of the examples at `index`
Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pairs:
    """Clean prompts with a corrupt partner each; positions may differ from example to example.

    Attributes:
        positions: semantic position -> absolute position in the clean prompt.
        corrupt_positions: the same in the corrupt prompt, where a sender's corrupt output is taken from.

    Raises:
        Invalid: clean and corrupt prompts differ in shape, or a position is not one inside each prompt.
    """

    clean_ids: Int[Tensor, "n t"]
    corrupt_ids: Int[Tensor, "n t"]
    positions: dict[str, Int[Tensor, "n"]]
    corrupt_positions: dict[str, Int[Tensor, "n"]]

    def __post_init__(self) -> None:
        shape, corrupt = list(self.clean_ids.shape), list(self.corrupt_ids.shape)
        if len(shape) != 2 or shape != corrupt:
            raise Invalid(
                f"clean_ids has shape {shape}, corrupt_ids {corrupt}: must be the same two, prompts by tokens"
            )
        check_positions(self.positions, shape[0], shape[1])
        check_positions(self.corrupt_positions, shape[0], shape[1], "corrupt_positions")
        if set(self.positions) - set(self.corrupt_positions):
            missing = ", ".join(sorted(set(self.positions) - set(self.corrupt_positions)))
            raise Invalid(f"corrupt_positions lacks {missing}: must name every position that positions names")


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


@dataclass(frozen=True)
class _Batch:
    """Examples that share all absolute positions.

    Attributes:
        index: which examples.
        starts: semantic position -> absolute position.
        clean: their clean run.
        changes: semantic position -> z_corrupt - z_clean there, [layers n h a].
        corrupt_logits: at the last position of the corrupt prompts.
    """

    index: Int[Tensor, "n"]
    starts: dict[str, int]
    clean: Run
    changes: dict[str, Float[Tensor, "layers n h a"]]
    corrupt_logits: Float[Tensor, "n vocab"]


class PathPatcher:
    """Path-patching effects of any senders on any receivers over one set of pairs.

    Attributes:
        clean: the measure on the clean runs, [n].
        corrupt: the measure on the corrupt runs, [n].
        clean_logits: at the last position of the clean runs, [n vocab].

    Args:
        walker: the model.
        pairs: the prompts.
        measure: what is read from the logits.
        memory_mib: rough limit on the working set; also the limit up to which the runs of step 1 are kept
            between calls (beyond it they are made again for every call). Changes results by rounding only.

    Raises:
        Invalid: prompts are padded or hold unknown tokens, or the measure is not a finite number on every prompt.
    """

    def __init__(self, walker: Walker, pairs: Pairs, measure: Measure, memory_mib: float) -> None:
        self.walker = walker
        self.pairs = pairs
        self.measure = measure
        self._budget = memory_mib * 2**20
        self._kept: dict[int, _Batch] = {}
        n, self._length = pairs.clean_ids.shape
        self._check_prompts()
        self._indices = self._split()
        self.clean = torch.empty(n, dtype=walker.logits_dtype)
        self.corrupt = torch.empty(n, dtype=walker.logits_dtype)
        self.clean_logits = torch.empty(n, walker.vocab_size, dtype=walker.logits_dtype)
        for batch in self._batches():
            self.clean[batch.index] = measure(batch.clean.logits[:, None], batch.index)[:, 0]
            self.corrupt[batch.index] = measure(batch.corrupt_logits[:, None], batch.index)[:, 0]
            self.clean_logits[batch.index] = batch.clean.logits
        check_finite(self.clean, "the measure of the clean run")
        check_finite(self.corrupt, "the measure of the corrupt run")

    def head_effects(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "layers h n"]]:
        """Effect of every single head at `position` on each of the receivers, per example.

        Returns:
            one tensor for each entry of `receivers`: measure(patched) - measure(clean).
        """
        layers, heads = self.walker.n_layers, self.walker.n_heads
        single = torch.eye(layers * heads, dtype=torch.bool).view(-1, layers, heads)
        return [effect.view(layers, heads, -1) for effect in self.effects(position, single, receivers)]

    def joint_effects(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "n"]]:
        """Effect of all heads at `position` together: does anything there feed these receivers at all?"""
        everything = torch.ones(1, self.walker.n_layers, self.walker.n_heads, dtype=torch.bool)
        return [effect[0] for effect in self.effects(position, everything, receivers)]

    @torch.no_grad()
    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        """Effect of each of e sets of senders at `position` on each of the receivers, per example.

        Raises:
            Invalid: the examples have no such position, senders or receivers are outside the model, or an effect is
                not a finite number.
        """
        self._check_paths(position, senders, receivers)
        first = _first_layer(senders)
        order = torch.argsort(first, stable=True)  # so that the sweep's joined rows are always the first ones
        results = [torch.zeros(len(senders), len(self.clean), dtype=self.walker.logits_dtype) for _ in receivers]
        tops = [self._top(receiver) for receiver in receivers]
        for batch in self._batches() if receivers else ():
            start = batch.starts[position]
            row = (self._length - start) * self._bytes_per_token() + self.clean_logits[0].nbytes
            size = max(1, int(min(self._budget, WORKING_MIB * 2**20) / (len(batch.index) * row)))
            live = order[first[order] < max(tops)]
            for rows in live.split(size):
                needed = {layer for receiver in receivers for layer in self._layers(receiver)}
                swept = self._sweep(batch, position, senders[rows], first[rows], needed)
                for receiver, top, result in zip(receivers, tops, results, strict=True):
                    for patched, logits in self._read(batch, start, first[rows], receiver, top, swept):
                        measured = self.measure(logits, batch.index) - self.clean[batch.index, None]
                        result[rows[patched, None], batch.index] = measured.T
        for receiver, result in zip(receivers, results, strict=True):
            if not bool(torch.isfinite(result).all()):
                row = int((~torch.isfinite(result)).any(1).int().argmax())
                heads = ", ".join(f"{layer}.{head}" for layer, head in senders[row].nonzero().tolist())
                check_finite(result[row], f"the effect of {heads} at '{position}' on {receiver}")
        return results

    def _sweep(
        self,
        batch: _Batch,
        position: str,
        senders: Bool[Tensor, "e layers h"],
        first: Int[Tensor, "e"],
        needed: set[int],
    ) -> dict[int, Float[Tensor, "n e d"]]:
        """Step 2: what enters each layer in `needed` at the sender position, for each set of senders."""
        start, total = batch.starts[position], len(senders)
        entering = batch.clean.residual[:, :, start, None]  # layers+1 n 1 d
        z = batch.clean.z[:, :, start, None]  # layers n 1 h a
        x = entering[0][:, :0]  # n (joined) d
        swept: dict[int, Tensor] = {}
        for layer in range(max(needed) + 1):
            if layer in needed:
                rest = entering[layer].expand(-1, total - x.shape[1], -1)
                swept[layer] = torch.cat([x, rest], dim=1)
            if layer == max(needed):
                break
            joined = int((first <= layer).sum())
            if joined == 0:
                continue
            writes = self.walker.head_writes(layer, batch.changes[position][layer])  # n h d
            moved = torch.einsum("nhd,eh->ned", writes, senders[:joined, layer].to(writes.dtype))
            x = torch.cat([x, entering[layer].expand(-1, joined - x.shape[1], -1)], dim=1)
            x = self.walker.after_attention(layer, x, self.walker.attention_output(layer, z[layer]) + moved)
        return swept

    def _read(
        self,
        batch: _Batch,
        start: int,
        first: Int[Tensor, "e"],
        receiver: Receivers,
        top: int,
        swept: dict[int, Float[Tensor, "n e d"]],
    ) -> Iterator[tuple[Int[Tensor, "f"], Float[Tensor, "n f vocab"]]]:
        """Step 3: yields (which of the swept rows, their logits); rows that are not yielded have effect 0."""
        if receiver.component is None:
            if start == self._length - 1:  # elsewhere frozen heads keep everything away from the last token
                yield torch.arange(len(first)), self.walker.logits(swept[top])
            return
        n, layers = len(batch.index), self._layers(receiver)
        window = Window.tail(n, start, self._length, self.walker.dtype)
        for entry, below in zip(layers, [-1, *layers], strict=False):
            rows = torch.nonzero((first >= below) & (first < entry))[
                :, 0
            ]  # their lowest changed receiver is at `entry`
            if len(rows) == 0:
                continue
            slices = {layer: self._slices(receiver, layer, swept[layer][:, rows]) for layer in layers}
            residual = batch.clean.residual[entry][:, None, start:].expand(-1, len(rows), -1, -1)
            yield (
                rows,
                self.walker.continue_from(batch.clean, window, residual, entry, _write(receiver, slices)),
            )

    def _slices(
        self, receiver: Receivers, layer: int, residual: Float[Tensor, "n e d"]
    ) -> tuple[list[int], Float[Tensor, "n e r a"]]:
        """The receiving heads of one layer (key-value heads for k and v) and what they read."""
        assert receiver.component is not None
        heads = {head for at, head in receiver.heads if at == layer}
        if receiver.component != Component.Q:
            heads = {self.walker.kv_head(head) for head in heads}
        chosen = sorted(heads)
        return chosen, self.walker.project(layer, receiver.component, residual)[:, :, chosen]

    def _layers(self, receiver: Receivers) -> list[int]:
        """Layers at whose entry the receivers read; the logits read what leaves the last layer."""
        return [self.walker.n_layers] if receiver.component is None else sorted({at for at, _ in receiver.heads})

    def _top(self, receiver: Receivers) -> int:
        return self._layers(receiver)[-1]

    def _check_prompts(self) -> None:
        config, longest = self.walker.model.config, self.walker.architecture.longest
        for what in ("clean_ids", "corrupt_ids"):
            ids = getattr(self.pairs, what)
            check_tokens(ids, self.walker.vocab_size, longest, what)
            check_padding(ids, config.pad_token_id, (config.bos_token_id, config.eos_token_id), what)
        one = torch.zeros(1, 1, self.walker.vocab_size, dtype=self.walker.logits_dtype)
        self.measure(one, torch.tensor([len(self.pairs.clean_ids) - 1]))  # a measure that cannot work fails here

    def _check_paths(self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]) -> None:
        check_name(position, self.pairs.positions)
        shape = (self.walker.n_layers, self.walker.n_heads)
        if senders.shape[1:] != shape:
            raise Invalid(
                f"senders have shape {list(senders.shape)}: must be sets by {shape[0]} layers by {shape[1]} heads"
            )
        for receiver in receivers:
            check_heads(receiver.heads, *shape, f"receiver of {receiver.component}")

    def _split(self) -> list[Int[Tensor, "n"]]:
        """Indices of examples that share all absolute positions, cut so that one batch fits the budget."""
        stacked = torch.stack([self.pairs.positions[name] for name in sorted(self.pairs.positions)], dim=1)
        _, which = torch.unique(stacked, dim=0, return_inverse=True)
        size = max(1, int(self._budget / (self._length * self._bytes_per_token())))
        groups = [torch.nonzero(which == group)[:, 0] for group in range(int(which.max()) + 1)]
        return [part for group in groups for part in group.split(size)]

    def _batches(self) -> Iterator[_Batch]:
        """Step 1 for one batch after the other; kept while all of them fit the budget."""
        for number, index in enumerate(self._indices):
            batch = self._kept.get(number)
            if batch is None:
                batch = self._run(index)
                fields = (
                    batch.clean.residual,
                    batch.clean.z,
                    batch.clean.keys,
                    batch.clean.values,
                )
                size = sum(field.numel() * field.element_size() for field in fields)
                if size / len(index) * len(self.pairs.clean_ids) <= self._budget:
                    self._kept[number] = batch
            yield batch

    @torch.no_grad()
    def _run(self, index: Int[Tensor, "n"]) -> _Batch:
        clean = self.walker.run(self.pairs.clean_ids[index])
        corrupt = self.walker.run(self.pairs.corrupt_ids[index])
        starts = {name: int(at[index[0]]) for name, at in self.pairs.positions.items()}
        rows = torch.arange(len(index))
        changes = {
            name: corrupt.z[:, rows, self.pairs.corrupt_positions[name][index]] - clean.z[:, :, start]
            for name, start in starts.items()
        }
        return _Batch(index, starts, clean, changes, corrupt.logits)

    def _bytes_per_token(self) -> int:
        """Rough working set of one layer for one token of one variant."""
        numbers = 6 * self.walker.width + 3 * self.walker.mlp_width + 3 * self.walker.n_heads * self._length
        return numbers * self.walker.dtype.itemsize


def _first_layer(senders: Bool[Tensor, "e layers h"]) -> Int[Tensor, "e"]:
    """Lowest layer with a sender; the number of layers for an empty set."""
    present = senders.any(-1)
    return torch.where(present.any(-1), present.int().argmax(-1), torch.tensor(senders.shape[1]))


def _write(receiver: Receivers, slices: dict[int, tuple[list[int], Tensor]]) -> Edit:
    """An edit that writes the receivers' slices at the sender position, the first slot of the window."""

    def edit(layer: int, site: str, x: Tensor, first: int) -> Tensor:
        if site != receiver.component or layer not in slices or first > 0:
            return x  # first > 0: queries of the last layer at any but the last token are not used by anything
        heads, values = slices[layer]
        x = x.clone()
        x[:, :, 0, heads] = values
        return x

    return edit
