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
   layer with `clean attention output + W_O (z_corrupt - z_clean)`, goes through the rest of the block, and then from
   layer to layer with the clean attention outputs. The residual stream that enters each receiving layer
   is kept;
3. logits receivers: final norm and head of those rows, only for the tokens that the measure reads. q / k / v
   receivers: project those rows, write the receivers' slices at p, and run only positions p..last; the prefix
   keeps its clean keys and values. This tail too is one pass over the layers for all senders: a sender joins at
   the lowest receiver above it, since below that everything is clean.

The sweep does not depend on the receivers: receivers that are asked for together share it, and it is kept for
later calls at the same position where the memory limit allows. Examples are grouped by the one position that is
asked for. Senders at or above the highest receiver have an effect of exactly 0 and are not run.

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

from stages.circuits.checks import check_finite, check_heads, check_name
from stages.circuits.circuit import Component
from stages.circuits.pairs import AlignedPairs
from stages.circuits.walker import Edit, Prefix, Walker, Window
from stages.pipeline.stage import Invalid

# On a processor, passes are cut so that the tensors of a layer stay near its cache; larger parts are slower.
CACHE_MIB = 64

# Shares of the memory limit: the pass at work, and at most so much for recorded runs and for sweeps that are kept.
# What then remains is for the sweep of a part of the examples.
PASS, RUNS, SWEEPS = 0.2, 0.4, 0.2

# measure(logits [n e vocab], index [n]) -> [n e]: one number for each patched run of the examples at `index`
Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TokenMeasure:
    """A measure that reads the logits of a few tokens only, so that no others are computed.

    Attributes:
        tokens: which tokens, for each example.
        reduce: their logits -> one number each.
        check: refuses a number of tokens in the vocabulary, or examples, that the measure does not fit.
    """

    tokens: Int[Tensor, "n k"]
    reduce: Callable[[Float[Tensor, "n e k"]], Float[Tensor, "n e"]]
    check: Callable[[int, Int[Tensor, "n"]], None] = lambda vocab, index: None

    def __call__(self, logits: Float[Tensor, "n e vocab"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        self.check(logits.shape[-1], index)
        tokens = self.tokens[index].to(logits.device)
        return self.reduce(logits.gather(-1, tokens[:, None].expand(-1, logits.shape[1], -1)))


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
class Progress:
    """How far one question about many sets of senders is.

    Attributes:
        done: sets of senders; one that is done for a part of the examples and receivers counts by that part.
        total: sets of senders that are run; those that can have no effect often are not.
        strongest: heads of the set with the largest mean effect so far, as "layer.head, ...".
        effect: that mean effect, in the unit of the measure.
    """

    done: float
    total: int
    strongest: str
    effect: float


@dataclass(frozen=True)
class _Runs:
    """What is kept of the clean runs of some examples, and what the corrupt runs change.

    Attributes:
        residual: clean residual stream entering each layer, and the final norm.
        keys: clean keys after the rotary embedding.
        values: clean values.
        attention: semantic position -> what attention gives there in each layer of the clean run.
        changes: semantic position -> z_corrupt - z_clean there.
    """

    residual: Float[Tensor, "depths n t d"]
    keys: Float[Tensor, "layers n g t a"]
    values: Float[Tensor, "layers n g t a"]
    attention: dict[str, Float[Tensor, "layers n d"]]
    changes: dict[str, Float[Tensor, "layers n h a"]]


@dataclass(frozen=True)
class _Batch:
    """Examples that share one sender position, seen from there.

    Attributes:
        index: which examples.
        start: the position.
        tail: clean residual stream entering each layer (and the final norm) from `start` on; layer -> [n s d].
        attention: what attention gives at `start` in each layer of the clean run.
        changes: z_corrupt - z_clean at `start`.
        prefix: clean keys and values before `start`.
    """

    index: Int[Tensor, "n"]
    start: int
    tail: Callable[[int], Float[Tensor, "n s d"]]
    attention: Float[Tensor, "layers n d"]
    changes: Float[Tensor, "layers n h a"]
    prefix: Prefix


class _Sweep:
    """Step 2 for one batch: grows from layer to layer as receivers ask for it.

    Attributes:
        batch: the examples.

    Args:
        senders: sets of senders, in order of their lowest layer.
        joined: depth -> how many of them have a sender below it.
        keep: depths whose streams are kept; None: all.
        rows: how many sets of senders go through an MLP at once.
    """

    def __init__(
        self,
        walker: Walker,
        batch: _Batch,
        senders: Bool[Tensor, "e layers h"],
        joined: list[int],
        keep: set[int] | None,
        rows: int,
    ) -> None:
        self.batch, self._walker, self._senders, self._joined = batch, walker, senders, joined
        self._keep, self._rows = keep, rows
        self._streams = {0: batch.attention[0, :, None][:, :0]}  # depth -> n joined d
        self._depth = 0

    def entering(self, depth: int) -> Float[Tensor, "n e d"]:
        """What enters layer `depth` (or the final norm), for the sets of senders that have a sender below it."""
        while self._depth < depth:
            x = self._step(self._streams[self._depth])
            if self._keep is not None and self._depth not in self._keep:
                del self._streams[self._depth]
            self._depth += 1
            self._streams[self._depth] = x
        return self._streams[depth]

    def _step(self, x: Float[Tensor, "n e d"]) -> Float[Tensor, "n f d"]:
        """From what enters a layer to what leaves it, with the senders of that layer patched."""
        layer, walker, batch = self._depth, self._walker, self.batch
        out = x.new_empty(x.shape[0], self._joined[layer + 1], x.shape[2])
        if out.shape[1] == 0:
            return out
        writes = walker.head_writes(layer, batch.changes[layer])  # n h d
        entering = batch.tail(layer)[:, :1]  # n 1 d
        here = self._senders[: out.shape[1], layer].to(writes.dtype)
        for first in range(0, out.shape[1], self._rows):
            rows = slice(first, min(first + self._rows, out.shape[1]))
            attention = (here[rows] @ writes).add_(batch.attention[layer][:, None])  # n rows d
            stream = x[:, rows]
            if new := attention.shape[1] - stream.shape[1]:  # senders that begin in this layer
                stream = torch.cat([stream, entering.expand(-1, new, -1)], dim=1)
            out[:, rows] = walker.after_attention(layer, stream, attention)
        return out


class PathPatcher:
    """Path-patching effects of any senders on any receivers over one set of pairs.

    Attributes:
        clean: the measure on the clean runs, [n].
        corrupt: the measure on the corrupt runs, [n].
        clean_logits: at the last position of the clean runs, [n vocab].
        watch: called now and then with the progress of a call of `effects`, and at its end; None by default.

    Results are on the CPU, wherever the model is.

    Args:
        walker: the model.
        pairs: the prompts.
        measure: what is read from the logits; called with logits on the model's device and an index on the CPU.
        memory_mib: limit on the working set, that is everything but the model, the pairs and the results. Runs
            and sweeps that do not fit are made again for every call. One example with one sender is the least
            that is run, whatever the limit. Changes results by rounding only.

    Raises:
        Invalid: no examples, prompts are padded or hold unknown tokens, or the measure is not a finite number on every
            prompt.
    """

    def __init__(self, walker: Walker, pairs: AlignedPairs, measure: Measure, memory_mib: float) -> None:
        self.walker = walker
        self.pairs = pairs
        self.measure = measure
        self.watch: Callable[[Progress], None] | None = None
        self._budget = memory_mib * 2.0**20
        self._sweeps: dict[str, list[_Sweep]] = {}  # position -> sweeps of all single heads, one a batch
        self._sweeps_bytes = 0
        n, self._length = pairs.clean_ids.shape
        self._check_prompts()
        self._dtype = walker.logits_dtype  # of effects: small differences of logits
        self.clean = torch.empty(n, dtype=self._dtype, device="cpu")
        self.corrupt = torch.empty(n, dtype=self._dtype, device="cpu")
        self.clean_logits = torch.empty(n, walker.vocab_size, dtype=self._dtype, device="cpu")
        layers, heads = walker.n_layers, walker.n_heads
        self._every_head = torch.eye(layers * heads, dtype=torch.bool, device="cpu").view(-1, layers, heads)
        self._kept: _Runs | None = None
        everything = torch.arange(n, device="cpu")
        if n * self._run_bytes() <= RUNS * self._budget:
            self._kept = self._run(everything)
        else:
            for index in everything.split(self._at_least_one(RUNS * self._budget, self._run_bytes())):
                self._run(index)
        check_finite(self.clean, "the measure of the clean run")
        check_finite(self.corrupt, "the measure of the corrupt run")

    def head_effects(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "layers h n"]]:
        """Effect of every single head at `position` on each of the receivers, per example.

        Returns:
            one tensor for each entry of `receivers`: measure(patched) - measure(clean).
        """
        shape = self._every_head.shape[1:]
        return [effect.view(*shape, -1) for effect in self.effects(position, self._every_head, receivers)]

    def joint_effects(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "n"]]:
        """Effect of all heads at `position` together: does anything there feed these receivers at all?"""
        everything = torch.ones(1, self.walker.n_layers, self.walker.n_heads, dtype=torch.bool, device="cpu")
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
        results = [self.clean.new_zeros(len(senders), len(self.clean)) for _ in receivers]
        if not receivers:
            return results
        keep_sweep = torch.equal(senders, self._every_head)  # what is asked for again and again
        needed = {layer for receiver in receivers for layer in self._layers(receiver)}
        first = _first_layer(senders)
        order = torch.argsort(first, stable=True)  # so that whatever has joined comes first
        keep_sweep = keep_sweep and self._keeps(position, first, receivers)
        order = order[first[order] < (self.walker.n_layers if keep_sweep else max(needed))]
        # the largest parts: as many sets of senders as fit for one example, then as many examples
        stream = (len(needed) + 3) * self.walker.width + self._read_numbers(receivers)
        stream *= self.walker.dtype.itemsize
        fixed = self._batch_bytes()
        sets = len(order) if keep_sweep else self._at_least_one(self._part_bytes() - fixed, stream)
        done, steps = 0, len(order) * len(self.clean) * len(receivers)
        for rows in order.split(sets):
            joined = [int((first[rows] < depth).sum()) for depth in range(self.walker.n_layers + 1)]
            size = len(self.clean) if keep_sweep else self._at_least_one(self._part_bytes(), fixed + len(rows) * stream)
            sweeps = self._sweeps.get(position) if keep_sweep else None
            if sweeps is None:
                sweeps = self._begin(position, size, senders[rows], joined, None if keep_sweep else needed)
                if keep_sweep:
                    sweeps = self._sweeps[position] = list(sweeps)
            for sweep in sweeps:
                batch = sweep.batch
                for receiver, result in zip(receivers, results, strict=True):
                    for part, logits in self._read(receiver, sweep, joined):
                        measured = self._measured(logits, batch.index) - self.clean[batch.index, None]
                        result[rows[part][:, None], batch.index] = measured.T
                        if self.watch is not None:
                            done += (part.stop - part.start) * len(batch.index)
                            self._tell(done / steps, senders[order], result[order])
        if self.watch is not None and steps:
            self._tell(1.0, senders[order], results[0][order])
        for receiver, result in zip(receivers, results, strict=True):
            if not bool(torch.isfinite(result).all()):
                row = int((~torch.isfinite(result)).any(1).int().argmax())
                check_finite(result[row], f"the effect of {_names(senders[row])} at '{position}' on {receiver}")
        return results

    def _tell(self, share: float, senders: Bool[Tensor, "e layers h"], result: Float[Tensor, "e n"]) -> None:
        """Say how far a call of `effects` is; examples that are not done yet count as unchanged."""
        assert self.watch is not None
        effects = result.mean(1)
        best = int(effects.abs().argmax())
        self.watch(Progress(share * len(senders), len(senders), _names(senders[best]), float(effects[best])))

    def _begin(
        self, position: str, size: int, senders: Bool[Tensor, "e layers h"], joined: list[int], keep: set[int] | None
    ) -> Iterator[_Sweep]:
        """A sweep for each batch of examples that share `position`, at most `size` at a time."""
        at, senders = self.pairs.positions[position], senders.to(self.walker.device)
        for start in at.unique().tolist():
            for index in torch.nonzero(at == start)[:, 0].split(size):
                rows = self._at_least_one(self._pass_bytes(), len(index) * self._sweep_bytes())
                yield _Sweep(self.walker, self._batch(position, start, index), senders, joined, keep, rows)

    def _read(
        self, receiver: Receivers, sweep: _Sweep, joined: list[int]
    ) -> Iterator[tuple[slice, Float[Tensor, "n f tokens"]]]:
        """Step 3: yields (which of the swept sets, their logits); those that are not yielded have effect 0."""
        batch, layers = sweep.batch, self._layers(receiver)
        n, tokens = len(batch.index), self._tokens(batch.index)
        length, last = self._length - batch.start, batch.start == self._length - 1
        if receiver.component is None:
            if last:  # elsewhere frozen heads keep everything away from the last token
                streams = sweep.entering(layers[-1])
                size = self._at_least_one(self._pass_bytes(), n * self._logits_bytes())
                for part in _slices(streams.shape[1], size):
                    yield part, self.walker.logits(streams[:, part], tokens)
            return
        window = Window.tail(n, batch.start, self._length, self.walker.dtype, self.walker.device)
        written = {layer: self._slices_read(receiver, layer, sweep.entering(layer)) for layer in layers}
        size = self._at_least_one(self._pass_bytes(), n * (length * self._token_bytes() + self._logits_bytes()))
        entries = [0] * (self.walker.n_layers + 1)  # layer -> sets of senders whose tail has begun there
        for layer in layers:
            entries[layer:] = [joined[layer]] * (self.walker.n_layers + 1 - layer)
        for part in _slices(entries[-1], size):
            lowest = next(layer for layer in layers if entries[layer] > part.start)

            def join(layer: int, x: Tensor, part: slice = part) -> Tensor:
                more = min(entries[layer], part.stop) - part.start - x.shape[1]
                return x if more <= 0 else torch.cat([x, batch.tail(layer)[:, None].expand(-1, more, -1, -1)], dim=1)

            residual = batch.tail(lowest)[:, None, :][:, :0]
            edit = _write(receiver, written, part)
            yield part, self.walker.continue_from(batch.prefix, window, residual, lowest, edit, join, tokens)

    def _slices_read(
        self, receiver: Receivers, layer: int, residual: Float[Tensor, "n e d"]
    ) -> tuple[Int[Tensor, "r"], Float[Tensor, "n e r a"]]:
        """The receiving heads of one layer (key-value heads for k and v) and what they read."""
        assert receiver.component is not None
        heads = {head for at, head in receiver.heads if at == layer}
        if receiver.component != Component.Q:
            heads = {self.walker.kv_head(head) for head in heads}
        chosen = torch.tensor(sorted(heads), device=residual.device)
        return chosen, self.walker.project(layer, receiver.component, residual)[:, :, chosen]

    def _layers(self, receiver: Receivers) -> list[int]:
        """Layers at whose entry the receivers read; the logits read what leaves the last layer."""
        return [self.walker.n_layers] if receiver.component is None else sorted({at for at, _ in receiver.heads})

    def _tokens(self, index: Int[Tensor, "n"]) -> Int[Tensor, "n k"] | None:
        if not isinstance(self.measure, TokenMeasure):
            return None
        return self.measure.tokens[index].to(self.walker.device)

    def _measured(self, logits: Float[Tensor, "n e tokens"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        logits = logits.to(self._dtype)
        measured = (
            self.measure.reduce(logits) if isinstance(self.measure, TokenMeasure) else self.measure(logits, index)
        )
        return measured.cpu()

    def _final(self, residual: Float[Tensor, "n t d"], index: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The measure of a run, from what leaves the last layer."""
        return self._measured(self.walker.logits(residual[:, -1:], self._tokens(index)), index)[:, 0]

    def _batch(self, position: str, start: int, index: Int[Tensor, "n"]) -> _Batch:
        runs = self._run(index) if self._kept is None else self._kept
        # a slice where possible, so that nothing is copied
        whole = self._kept is None or len(index) == len(self.clean)
        which = slice(None) if whole else index.to(self.walker.device)

        def tail(layer: int) -> Tensor:
            return runs.residual[layer, :, start:][which]

        prefix = Prefix(runs.keys[:, :, :, :start][:, which], runs.values[:, :, :, :start][:, which])
        attention, changes = runs.attention[position][:, which], runs.changes[position][:, which]
        return _Batch(index, start, tail, attention, changes, prefix)

    @torch.no_grad()
    def _run(self, index: Int[Tensor, "n"]) -> _Runs:
        """Step 1 for some examples; a few at a time, since a run holds more than what is kept of it."""
        walker, pairs, n = self.walker, self.pairs, len(index)
        layers, places = walker.n_layers, {"dtype": walker.dtype, "device": walker.device}
        residual = torch.empty(layers + 1, n, self._length, walker.width, **places)
        keys = torch.empty(layers, n, walker.n_kv_heads, self._length, walker.head_dim, **places)
        values = torch.empty_like(keys)
        attention = {name: torch.empty(layers, n, walker.width, **places) for name in pairs.positions}
        changes = {name: torch.empty(layers, n, walker.n_heads, walker.head_dim, **places) for name in pairs.positions}
        for part in _slices(n, self._at_least_one(PASS * self._budget, self._whole_run_bytes())):
            chosen = index[part]
            rows = torch.arange(len(chosen), device=walker.device)
            at = {name: where[chosen].to(walker.device) for name, where in pairs.positions.items()}
            clean = walker.run(pairs.clean_ids[chosen].to(walker.device))
            residual[:, part], keys[:, part], values[:, part] = clean.residual, clean.keys, clean.values
            for name in pairs.positions:
                z = clean.z[:, rows, at[name]]
                attention[name][:, part] = torch.stack(
                    [walker.attention_output(layer, z[layer]) for layer in range(layers)]
                )
                changes[name][:, part] = z
            self.clean[chosen] = self._final(clean.residual[-1], chosen)
            self.clean_logits[chosen] = clean.logits.cpu()
            del clean
            corrupt = walker.run(pairs.corrupt_ids[chosen].to(walker.device))
            for name, where in pairs.corrupt_positions.items():
                changes[name][:, part] = corrupt.z[:, rows, where[chosen].to(walker.device)] - changes[name][:, part]
            self.corrupt[chosen] = self._final(corrupt.residual[-1], chosen)
        return _Runs(residual, keys, values, attention, changes)

    def _keeps(self, position: str, first: Int[Tensor, "e"], receivers: Sequence[Receivers]) -> bool:
        """Whether the sweep of all single heads at `position` is kept: it is already, or it fits."""
        if position in self._sweeps:
            return True
        if self._kept is None:
            return False
        n, itemsize = len(self.clean), self.walker.dtype.itemsize
        streams = sum(int((first < depth).sum()) for depth in range(self.walker.n_layers + 1)) * self.walker.width
        size = n * (streams * itemsize + self._batch_bytes())
        read = n * len(first) * self._read_numbers(receivers) * itemsize
        if self._sweeps_bytes + size > SWEEPS * self._budget or size + read > self._part_bytes():
            return False
        self._sweeps_bytes += size
        return True

    def _check_prompts(self) -> None:
        for what in ("clean_ids", "corrupt_ids"):
            self.walker.check_prompts(getattr(self.pairs, what), what)
        one = torch.zeros(1, 1, self.walker.vocab_size, dtype=self.walker.logits_dtype, device="cpu")
        last = torch.tensor([len(self.pairs.clean_ids) - 1], device="cpu")
        self.measure(one, last)  # a measure that cannot work fails here

    def _check_paths(self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]) -> None:
        check_name(position, self.pairs.positions)
        shape = (self.walker.n_layers, self.walker.n_heads)
        if senders.shape[1:] != shape:
            raise Invalid(
                f"senders have shape {list(senders.shape)}: must be sets by {shape[0]} layers by {shape[1]} heads"
            )
        for receiver in receivers:
            check_heads(receiver.heads, *shape, f"receiver of {receiver.component}")

    # Sizes in bytes, each an upper estimate of what is alive at once.

    def _at_least_one(self, limit: float, size: int) -> int:
        return max(1, int(limit / size))

    def _part_bytes(self) -> float:
        """What is left for the sweep of a part of the examples."""
        runs = 0 if self._kept is None else len(self.clean) * self._run_bytes()
        working = max(PASS * self._budget, self._whole_run_bytes())  # a run of one example is the least
        return self._budget - working - runs - self._sweeps_bytes

    def _pass_bytes(self) -> float:
        """Limit on one pass: the budget's share, and on a processor no more than its cache holds well."""
        share = PASS * self._budget
        return min(share, CACHE_MIB * 2.0**20) if self.walker.device.type == "cpu" else share

    def _run_bytes(self) -> int:
        """What is kept of the runs of one example."""
        walker, length, positions = self.walker, self._length, len(self.pairs.positions)
        heads = walker.n_heads * walker.head_dim
        numbers = (walker.n_layers + 1) * length * walker.width
        numbers += walker.n_layers * (2 * length * walker.n_kv_heads * walker.head_dim)
        numbers += walker.n_layers * positions * (walker.width + heads)
        return numbers * walker.dtype.itemsize

    def _whole_run_bytes(self) -> int:
        """A run of one example as the walker makes it: what it records, once more as it is stacked, and a layer."""
        walker = self.walker
        heads = walker.n_heads * walker.head_dim
        numbers = walker.n_layers * (walker.width + heads + 2 * walker.n_kv_heads * walker.head_dim)
        return self._length * (2 * numbers * walker.dtype.itemsize + self._token_bytes()) + 3 * self._logits_bytes(
            whole=True
        )

    def _batch_bytes(self) -> int:
        """What a batch copies for one example: keys and values of the prefix, the tail that enters a layer."""
        walker = self.walker
        prefix = walker.n_layers * 2 * self._length * walker.n_kv_heads * walker.head_dim
        heads = walker.n_layers * (walker.width + walker.n_heads * walker.head_dim)
        copied = prefix + heads + self._length * walker.width
        return copied * walker.dtype.itemsize + (self._run_bytes() if self._kept is None else 0)

    def _read_numbers(self, receivers: Sequence[Receivers]) -> int:
        """What receivers read from one set of senders: a projection, and its slices for all layers."""
        return (self.walker.n_heads + max(len(receiver.heads) for receiver in receivers)) * self.walker.head_dim

    def _sweep_bytes(self) -> int:
        """One position of one set of senders on its way through an MLP."""
        return (7 * self.walker.width + 3 * self.walker.mlp_width) * self._working_itemsize()

    def _token_bytes(self) -> int:
        """One token of one set of senders on its way through a layer."""
        walker, heads = self.walker, self.walker.n_heads * self.walker.head_dim
        attention = 4 * heads + 6 * walker.n_kv_heads * walker.head_dim + 4 * walker.n_heads * self._length
        return attention * self._working_itemsize() + self._sweep_bytes()

    def _logits_bytes(self, whole: bool = False) -> int:
        """Logits of one row, with what a measure makes of them."""
        walker = self.walker
        if isinstance(self.measure, TokenMeasure) and not whole:
            return (4 * self.measure.tokens.shape[1] + 3 * walker.width) * self._working_itemsize()
        return 3 * walker.vocab_size * self._working_itemsize()

    def _working_itemsize(self) -> int:
        """Norms and softmax compute in at least float32."""
        return max(self.walker.dtype.itemsize, 4)


def _slices(total: int, size: int) -> Iterator[slice]:
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))


def _names(senders: Bool[Tensor, "layers h"]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in senders.nonzero().tolist())


def _first_layer(senders: Bool[Tensor, "e layers h"]) -> Int[Tensor, "e"]:
    """Lowest layer with a sender; the number of layers for an empty set."""
    present = senders.any(-1)
    return torch.where(present.any(-1), present.int().argmax(-1), senders.shape[1])


def _write(receiver: Receivers, written: dict[int, tuple[Tensor, Tensor]], part: slice) -> Edit:
    """An edit that writes what the receivers read at the sender position, the first slot of the window.

    Args:
        written: layer -> receiving heads, and what they read for each set of senders that reaches the layer.
        part: the sets of senders that the pass carries.
    """

    def edit(layer: int, site: str, x: Tensor, first: int) -> Tensor:
        if site == receiver.component and layer in written and first == 0:
            # first > 0: queries of the last layer at any but the last token are not used by anything
            heads, values = written[layer]
            x[:, :, 0, heads] = values[:, part]  # in place: what an edit is given was made for it
        return x

    return edit
