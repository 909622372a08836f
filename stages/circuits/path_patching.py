"""Path patching, exact and local to the senders' tokens.

Definition (Wang et al. 2022, section 3.1; Prakash et al. 2024, section 3). Sender heads at position p take
their corrupt outputs; every other head output is frozen at its clean value; MLPs and norms are recomputed.
What the receivers then read at p (the logits, or q / k / v of chosen heads) is written into a second clean
run, in which everything downstream is free. The effect is the change of a measure of that second run's
logits. A position may span k tokens: senders take their corrupt outputs, and receivers what they read, at all of
them; the logits are read at the last token of the prompt, so they receive what the span does if it holds that token.

Algorithm:

1. one clean and one corrupt run of every prompt (`recording`);
2. the sweep (`sweep`): one pass over the layers carries the k tokens of a position for all senders at once. A sender
   joins at its own layer with `clean attention output + W_O (z_corrupt - z_clean)`, goes through the rest of the block,
   and then from layer to layer with the clean attention outputs. The residual stream that enters each receiving layer
   is kept;
3. logits receivers: final norm and head of those rows, only for the tokens that the measure reads. q / k / v
   receivers: project those rows, write the receivers' slices, and run only the tokens from the earliest of the k on;
   the prefix keeps its clean keys and values. This tail too is one pass over the layers for all senders: a sender
   joins at the lowest receiver above it, since below that everything is clean.

What the sweep needs at a position is little, and is kept. The runs that tails need are kept where the memory limit
allows, else the clean ones are made again for the part of the examples at work. The sweep does not depend on the
receivers: receivers that are asked for together share it, and that of all single heads is kept for later calls at the
same position where it fits. Examples are grouped by where the position begins. Senders at or above the highest receiver
have an effect of exactly 0 and are not run.

Validity: any decoder with token-wise norms and MLPs, whose families `architectures` lists; blocks with a norm after
attention and parallel blocks are exact too, since the sweep takes each layer whole. Queries and keys are patched as
they are projected, before any norm on them and the rotary embedding. With grouped queries a k / v receiver is the
key-value head that the head reads from. LoRA adapters must be merged first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.budget import gradient_bytes
from stages.circuits.checks import check_finite
from stages.circuits.estimates import estimated, slopes
from stages.circuits.pairs import AlignedPairs
from stages.circuits.patcher import Patcher, check_paths, every_head, names
from stages.circuits.patcher import Progress as Progress
from stages.circuits.patching_budget import PASS, TAILS, Budget, Sizes, at_least_one, pass_limit
from stages.circuits.readout import FewTokens, Measure, correct
from stages.circuits.readout import TokenMeasure as TokenMeasure
from stages.circuits.recording import CleanRuns, record
from stages.circuits.sweep import Chains, Read, Sweep, Tails, first_layer, parts, reached, read_heads, tail_logits
from stages.circuits.sweep import Receivers as Receivers
from stages.circuits.walker import Run, Walker


@dataclass(frozen=True)
class _Batch:
    """Examples whose position begins at the same token, and holds the last token or does not.

    Attributes:
        index: which examples.
        at: tokens of the position.
        sweep: over all of them.
        runs: for their tails, where these had to be made with the chains.
    """

    index: Int[Tensor, "n"]
    at: Int[Tensor, "n k"]
    sweep: Sweep
    runs: CleanRuns | None

    @property
    def start(self) -> int:
        return int(self.at.min())


# (batch, receivers, depth -> joined sets) -> (receiver, which of the batch, which of the swept sets, their effects)
_Reader = Callable[[_Batch, Sequence[Receivers], list[int]], Iterator[tuple[int, slice, slice, Tensor]]]


class PathPatcher(Patcher):
    """A `Patcher` over pairs of one length.

    Attributes:
        clean, corrupt, correct, watch, walker: see `Patcher`.
        predictions: the most probable token after every clean prompt.

    Args:
        walker: the model.
        pairs: the prompts.
        measure: what is read from the logits; called with logits on the model's device and an index on the CPU.
        memory_mib: limit on the working set, that is everything but the model, the pairs and the results; or a limit
            that is shared with other patchers. What does not fit is made again for every call. One example with one
            sender is the least that is run, whatever the limit. Changes results by rounding only.

    Raises:
        Invalid: no examples, prompts are padded or hold unknown tokens, or the measure is not a finite number on every
            prompt.
    """

    def __init__(self, walker: Walker, pairs: AlignedPairs, measure: Measure, memory_mib: float | int | Budget) -> None:
        self.walker = walker
        self.pairs = pairs
        self.measure = measure
        self.watch: Callable[[Progress], None] | None = None
        self._budget = memory_mib if isinstance(memory_mib, Budget) else Budget(memory_mib)
        n, self._length = pairs.clean_ids.shape
        self._check_prompts()
        of_tokens = measure.tokens.shape[1] if isinstance(measure, FewTokens) else None
        self._sizes = Sizes(walker, self._length, max(self._length, pairs.corrupt_ids.shape[1]), of_tokens)
        self._sweeps: dict[str, list[_Batch]] = {}  # position -> sweeps of all single heads
        self._reached: dict[str, int] = {}  # position -> depth up to which room is taken for them
        self._chains: dict[str, Chains] = {}  # position -> of all examples
        self._runs: CleanRuns | None = None
        self._asked: set[str] = set()  # positions whose tails were
        self._dtype = walker.logits_dtype  # of effects: small differences of logits
        self.clean = torch.empty(n, dtype=self._dtype, device="cpu")
        self.corrupt = torch.empty(n, dtype=self._dtype, device="cpu")
        self.predictions = torch.empty(n, dtype=torch.long, device="cpu")
        chain = self._sizes.chain()
        kept = [name for name, at in pairs.spans.items() if self._budget.keep("chains", at.numel() * chain)]
        ends = self._ends(pairs.positions)
        fits = self._budget.keep("runs", n * self._sizes.runs(*ends))
        everything = torch.arange(n, device="cpu")
        self._chains, self._runs = self._record(everything, kept, ends if fits else None, measured=True)
        check_finite(self.clean, "the measure of the clean run")
        check_finite(self.corrupt, "the measure of the corrupt run")

    @property
    def correct(self) -> Bool[Tensor, "n"]:
        return correct(self.predictions, self.measure)

    @property
    def positions(self) -> Mapping[str, Int[Tensor, "n ..."]]:
        return self.pairs.positions

    @torch.no_grad()
    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        """As `Patcher.effects`."""
        return self._ask(position, senders, receivers, self._read)

    @torch.no_grad()
    def estimates(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "layers h n"]]:
        """As `Patcher.estimates`."""
        shape = (self.walker.n_layers, self.walker.n_heads)
        found = self._ask(position, every_head(*shape), receivers, self._estimate)
        return [effects.view(*shape, -1) for effects in found]

    def _ask(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers], reader: _Reader
    ) -> list[Float[Tensor, "e n"]]:
        """What a reader makes of each set of senders, for each of the receivers."""
        check_paths(self, position, senders, receivers)
        results = [self.clean.new_zeros(len(senders), len(self.clean)) for _ in receivers]
        if not receivers:
            return results
        layers = self.walker.n_layers
        if position in self._chains and any(receiver.component is not None for receiver in receivers):
            self._ready_runs(position)
        needed = {layer for receiver in receivers for layer in receiver.layers(layers)}
        first = first_layer(senders)
        order = torch.argsort(first, stable=True)  # so that whatever has joined comes first
        # all single heads are asked for again and again
        again = torch.equal(senders, every_head(layers, self.walker.n_heads)) and self._keeps(
            position, first, max(needed)
        )
        order = order[first[order] < (layers if again else max(needed))]
        tokens = self.pairs.spans[position].shape[1]
        # the largest parts: as many sets of senders as fit for one example, then as many examples
        stream = self._sizes.stream(len(needed), tokens)
        fixed = self._example_bytes(position)
        room = (1 - TAILS) * self._left()
        sets = len(order) if again else at_least_one(room - fixed, stream)
        done, steps = 0.0, len(order) * len(self.clean) * len(receivers)
        for rows in order.split(max(1, sets)):
            joined = [int((first[rows] < depth).sum()) for depth in range(layers + 1)]
            batches = self._sweeps.get(position) if again else None
            if batches is None:
                size = len(self.clean) if again else at_least_one(room, fixed + len(rows) * stream)
                batches = self._begin(position, size, senders[rows], joined, None if again else needed)
                if again:
                    batches = self._sweeps[position] = list(batches)
            for batch in batches:
                for number, few, part, effects in reader(batch, receivers, joined):
                    index, result = batch.index[few], results[number]
                    result[rows[part][:, None], index] = effects.T
                    if self.watch is not None:
                        done += (part.stop - part.start) * len(index)
                        self._tell(done / steps, senders[order], result[order])
        if self.watch is not None and steps:
            self._tell(1.0, senders[order], results[0][order])
        for receiver, result in zip(receivers, results, strict=True):
            if not bool(torch.isfinite(result).all()):
                row = int((~torch.isfinite(result)).any(1).int().argmax())
                check_finite(result[row], f"the effect of {names(senders[row])} at '{position}' on {receiver}")
        return results

    def _tell(self, share: float, senders: Bool[Tensor, "e layers h"], result: Float[Tensor, "e n"]) -> None:
        """Say how far a call of `effects` is; examples that are not done yet count as unchanged."""
        assert self.watch is not None
        effects = result.mean(1)
        best = int(effects.abs().argmax())
        self.watch(Progress(share * len(senders), len(senders), names(senders[best]), float(effects[best])))

    def _begin(
        self, position: str, size: int, senders: Bool[Tensor, "e layers h"], joined: list[int], keep: set[int] | None
    ) -> Iterator[_Batch]:
        """A sweep for each batch of examples, at most `size` at a time."""
        spans, senders = self.pairs.spans[position], senders.to(self.walker.device)
        kinds = torch.stack([spans.amin(1), (spans == self._length - 1).any(1).long()], dim=1)
        for kind in kinds.unique(dim=0):
            for index in torch.nonzero((kinds == kind).all(1))[:, 0].split(size):
                runs = None
                if position in self._chains:
                    chains = self._chains[position]
                    # a slice where possible, so that nothing is copied
                    which = slice(None) if len(index) == len(self.clean) else index.to(self.walker.device)
                    chains = chains.select(which)
                else:
                    start = int(kind[0])
                    made, runs = self._record(index, [position], (start, start))
                    chains = made[position]
                limit, each = self._pass_bytes(), self._sizes.in_mlp()
                few = at_least_one(limit, each)
                sweep_size = (few, at_least_one(limit, min(few, chains.attention[0, ..., 0].numel()) * each))
                sweep = Sweep(self.walker, chains, senders, joined, keep, sweep_size)
                yield _Batch(index, spans[index], sweep, runs)

    def _read(
        self, batch: _Batch, receivers: Sequence[Receivers], joined: list[int]
    ) -> Iterator[tuple[int, slice, slice, Float[Tensor, "n f"]]]:
        """Step 3: yields (receiver, which of the batch, which of the swept sets, their effects); those that are not
        yielded have effect 0."""
        yield from self._read_logits(batch, receivers)
        heads, sets = _of_heads(receivers, joined)
        each = sets * self._sizes.read([receiver for _, receiver in heads], batch.at.shape[1])
        for few, tails in self._tails(batch, each) if sets else ():
            for number, receiver in heads:
                for some, part, effects in self._read_heads(batch, few, tails, receiver, joined):
                    yield number, some, part, effects

    def _estimate(
        self, batch: _Batch, receivers: Sequence[Receivers], joined: list[int]
    ) -> Iterator[tuple[int, slice, slice, Float[Tensor, "n f"]]]:
        """As `_read`, with slopes instead of the tails of q, k and v (`estimates`)."""
        yield from self._read_logits(batch, receivers)
        heads, sets = _of_heads(receivers, joined)
        if not sets:
            return
        everything = batch.sweep.of_all_heads({layer for _, receiver in heads for layer in receiver.layers(0)})
        layers = self.walker.n_layers - min(receiver.layers(0)[0] for _, receiver in heads)
        length = self._length - batch.start
        each = gradient_bytes(self.walker, length, self._length, layers) + layers * length * self.walker.width * 4
        each += sets * self._sizes.stream(0, 1)
        for few, tails in self._tails(batch, each):
            index = batch.index[few]
            for number, receiver in heads:
                measured = partial(self._measured, index=index)
                of = slopes(self.walker, receiver, everything, few, tails, self._tokens(index), measured)
                for some, part in self._passes(len(index), sets, length * self._sizes.in_layer()):
                    inside = slice(few.start + some.start, few.start + some.stop)
                    slope = {layer: slope[some] for layer, slope in of.items()}
                    found = estimated(self.walker, receiver, batch.sweep, inside, tails.select(some), slope, part)
                    yield number, inside, part, found.to(self._dtype).cpu()

    def _read_logits(
        self, batch: _Batch, receivers: Sequence[Receivers]
    ) -> Iterator[tuple[int, slice, slice, Float[Tensor, "n f"]]]:
        """The receivers that are the logits."""
        numbers = [number for number, receiver in enumerate(receivers) if receiver.component is None]
        last = batch.at == self._length - 1
        if not numbers or not bool(last.any()):
            return  # frozen heads keep everything away from the last token
        streams = batch.sweep.entering(self.walker.n_layers)  # n k e d
        n, tokens, sets = streams.shape[:3]
        chain = last.int().argmax(1).to(streams.device)
        for few, part in self._passes(n, sets, self._sizes.logits()):
            rows = torch.arange(few.start, few.stop, device=streams.device)
            one = streams[few, 0, part] if tokens == 1 else streams[rows, chain[few], part]
            logits = self.walker.logits(one, self._tokens(batch.index[few]))
            for number in numbers:
                yield number, few, part, self._change(logits, batch.index[few])

    def _read_heads(
        self, batch: _Batch, few: slice, tails: Tails, receiver: Receivers, joined: list[int]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "n f"]]]:
        """q, k or v receivers, for the examples `few` of the batch, whose tails these are."""
        walker, layers, n = self.walker, receiver.layers(self.walker.n_layers), few.stop - few.start
        entries = reached(walker, receiver, joined)
        read: Read = {layer: self._projected(receiver, layer, batch.sweep.entering(layer)[few]) for layer in layers}
        size = tails.length * self._sizes.in_layer() + self._sizes.logits()
        for some, part in self._passes(n, entries[-1], size):
            whole = some == slice(0, n)
            here = tails if whole else tails.select(some)
            now = read if whole else {layer: (heads, values[some]) for layer, (heads, values) in read.items()}
            inside = slice(few.start + some.start, few.start + some.stop)
            logits = tail_logits(walker, receiver, now, here, entries, part, self._tokens(batch.index[inside]))
            yield inside, part, self._change(logits, batch.index[inside])

    def _projected(
        self, receiver: Receivers, layer: int, streams: Float[Tensor, "n k e d"]
    ) -> tuple[Int[Tensor, "r"], Float[Tensor, "n k e r a"]]:
        """What receivers of a layer read, made in parts that fit a pass."""
        n, tokens, sets = streams.shape[:3]
        size = at_least_one(PASS * self._budget.limit, tokens * max(1, sets) * self._sizes.projected())
        if size >= n:
            return read_heads(self.walker, receiver, layer, streams)
        made = [read_heads(self.walker, receiver, layer, streams[few]) for few in parts(n, size)]
        return made[0][0], torch.cat([values for _, values in made])

    def _passes(self, n: int, sets: int, size: int) -> Iterator[tuple[slice, slice]]:
        """Parts of n examples by sets of senders, of which one of one takes `size` bytes, that fit a pass."""
        limit = self._pass_bytes()
        few = min(n, at_least_one(limit, size))
        for some in parts(n, few):
            for part in parts(sets, at_least_one(limit, few * size)):
                yield some, part

    def _tails(self, batch: _Batch, each: float | int) -> Iterator[tuple[slice, Tails]]:
        """As many examples of a batch at once as fit, of which one takes so many bytes beside its tail, and their
        tails."""
        each += self._sizes.tail_copies(batch.start)
        if self._runs is None and batch.runs is None:
            each += self._sizes.runs(batch.start, batch.start)
        for few in parts(len(batch.at), at_least_one(TAILS * self._left(), each)):
            yield few, self._tails_of(batch, few)

    def _tails_of(self, batch: _Batch, few: slice) -> Tails:
        """From the runs that are kept or came with the chains of a batch, or from new ones."""
        start, index = batch.start, batch.index[few]
        if batch.runs is not None:
            runs, which = batch.runs, few
        elif self._runs is not None:
            runs, which = self._runs, index.to(self.walker.device)
        else:
            runs, which = self._record(index, [], (start, start))[1], slice(None)
        assert runs is not None
        if len(index) == runs.residual.shape[1]:
            which = slice(None)  # a slice where possible, so that nothing is copied
        return runs.tails(which, start, batch.at[few])

    def _record(
        self, index: Int[Tensor, "n"], names: Sequence[str], ends: tuple[int, int] | None, measured: bool = False
    ) -> tuple[dict[str, Chains], CleanRuns | None]:
        """Step 1 for some examples."""
        size = at_least_one(PASS * self._budget.limit, self._sizes.making())
        return record(self.walker, self.pairs, index, names, ends, size, self._measure if measured else None)

    def _measure(self, corrupt: bool, index: Int[Tensor, "n"], run: Run) -> None:
        """The measure of runs."""
        logits = self.walker.logits(run.residual[-1][:, -1:], self._tokens(index))
        (self.corrupt if corrupt else self.clean)[index] = self._measured(logits, index)[:, 0]
        if not corrupt:
            self.predictions[index] = run.logits.argmax(-1).cpu()

    def _ends(self, names: Iterable[str]) -> tuple[int, int]:
        """Where the first of some positions begins, and where the prefixes of their tails end."""
        spans = [self.pairs.spans[name] for name in names]
        return min(int(at.min()) for at in spans), max(int(at.amin(1).max()) for at in spans)

    def _ready_runs(self, position: str) -> None:
        """Have the clean runs that tails from a position on need, if they fit: with the ones for positions that were
        asked for before, else alone."""
        if self._runs is not None and self._runs.cover(*self._ends([position])):
            return
        n = len(self.clean)
        if self._runs is not None:
            self._budget.keep("runs", -n * self._sizes.runs(*self._runs.ends))
            self._runs = None
        for ends in (self._ends({position} | self._asked), self._ends([position])):
            if self._budget.keep("runs", n * self._sizes.runs(*ends)):
                self._runs = self._record(torch.arange(n, device="cpu"), [], ends)[1]
                break
        self._asked.add(position)

    def _tokens(self, index: Int[Tensor, "n"]) -> Int[Tensor, "n k"] | None:
        if not isinstance(self.measure, FewTokens):
            return None
        return self.measure.tokens[index].to(self.walker.device)

    def _change(self, logits: Float[Tensor, "n e tokens"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        """Effects: the measure less that of the clean runs."""
        return self._measured(logits, index) - self.clean[index, None]

    def _measured(self, logits: Float[Tensor, "n e tokens"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        logits, measure = logits.to(self._dtype), self.measure
        return (measure.read(logits, index) if isinstance(measure, FewTokens) else measure(logits, index)).cpu()

    def _keeps(self, position: str, first: Int[Tensor, "e"], depth: int) -> bool:
        """Whether the sweep of all single heads at `position` is kept up to a depth: it is already, or it fits."""
        if position not in self._chains:
            return False

        def size(depth: int) -> int:
            streams = sum(int((first < below).sum()) for below in range(depth + 1))
            return len(self.clean) * self._sizes.sweep(streams, self.pairs.spans[position].shape[1])

        reached, had = self._reached.get(position, 0), position in self._sweeps
        if had and depth <= reached:
            return True
        more = size(depth) - (size(reached) if had else 0)
        if more <= TAILS * self._left() and self._budget.keep("sweeps", more):
            self._reached[position] = depth
            return True
        if had:
            self._budget.keep("sweeps", -size(reached))
            del self._sweeps[position], self._reached[position]
        return False

    def _check_prompts(self) -> None:
        for what in ("clean_ids", "corrupt_ids"):
            self.walker.check_prompts(getattr(self.pairs, what), what)
        one = torch.zeros(1, 1, self.walker.vocab_size, dtype=self.walker.logits_dtype, device="cpu")
        last = torch.tensor([len(self.pairs.clean_ids) - 1], device="cpu")
        self.measure(one, last)  # a measure that cannot work fails here

    def _left(self) -> float:
        return self._budget.left(self._sizes.making())

    def _pass_bytes(self) -> float:
        return pass_limit(self.walker, self._budget.limit)

    def _example_bytes(self, position: str) -> int:
        """What a batch holds for one example beside its streams."""
        spans = self.pairs.spans[position]
        size = spans.shape[1] * self._sizes.chain()
        if position not in self._chains:
            size += self._sizes.runs(*self._ends([position]))
        return size


def _of_heads(receivers: Sequence[Receivers], joined: list[int]) -> tuple[list[tuple[int, Receivers]], int]:
    """The receivers that are heads, with their numbers, and how many sets of senders reach any."""
    heads = [(number, receiver) for number, receiver in enumerate(receivers) if receiver.component is not None]
    return heads, max((joined[receiver.layers(0)[-1]] for _, receiver in heads), default=0)
