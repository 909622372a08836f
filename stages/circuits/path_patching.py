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
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.checks import check_finite
from stages.circuits.pairs import AlignedPairs
from stages.circuits.patcher import Patcher, check_paths, every_head, names
from stages.circuits.patcher import Progress as Progress
from stages.circuits.patching_budget import PASS, TAILS, Budget, Sizes, at_least_one, pass_limit
from stages.circuits.path_ends import Batch, PathEnds, Reader
from stages.circuits.readout import FewTokens, Measure, correct
from stages.circuits.readout import TokenMeasure as TokenMeasure
from stages.circuits.recording import CleanRuns, record
from stages.circuits.sweep import Chains, Sweep, Tails, first_layer, parts
from stages.circuits.sweep import Receivers as Receivers
from stages.circuits.walker import Run, Walker


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
        self._sweeps: dict[str, list[Batch]] = {}  # position -> sweeps of all single heads
        self._reached: dict[str, int] = {}  # position -> depth up to which room is taken for them
        self._chains: dict[str, Chains] = {}  # position -> of all examples
        self._runs: CleanRuns | None = None
        self._asked: set[str] = set()  # positions whose tails were
        self._dtype = walker.logits_dtype  # of effects: small differences of logits
        self.clean = torch.empty(n, dtype=self._dtype, device="cpu")
        self.corrupt = torch.empty(n, dtype=self._dtype, device="cpu")
        self._reads = PathEnds(walker, measure, self._sizes, self._budget, self.clean)
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
        return self._ask(position, senders, receivers, self._reads.effects)

    @torch.no_grad()
    def estimates(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "layers h n"]]:
        """As `Patcher.estimates`."""
        shape = (self.walker.n_layers, self.walker.n_heads)
        found = self._ask(position, every_head(*shape), receivers, self._reads.estimates)
        return [effects.view(*shape, -1) for effects in found]

    def _ask(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers], reader: Reader
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
                for number, few, part, effects in reader(batch, partial(self._tails, batch), receivers, joined):
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
    ) -> Iterator[Batch]:
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
                yield Batch(index, spans[index], self._length, sweep, runs)

    def _tails(self, batch: Batch, each: float | int) -> Iterator[tuple[slice, Tails]]:
        """As many examples of a batch at once as fit, of which one takes so many bytes beside its tail, and their
        tails."""
        each += self._sizes.tail_copies(batch.start)
        if self._runs is None and batch.runs is None:
            each += self._sizes.runs(batch.start, batch.start)
        for few in parts(len(batch.at), at_least_one(TAILS * self._left(), each)):
            yield few, self._tails_of(batch, few)

    def _tails_of(self, batch: Batch, few: slice) -> Tails:
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
        logits = self.walker.logits(run.residual[-1][:, -1:], self._reads.tokens(index))
        (self.corrupt if corrupt else self.clean)[index] = self._reads.measured(logits, index)[:, 0]
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
