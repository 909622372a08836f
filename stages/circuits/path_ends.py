"""Where the paths of path patching end: what a swept batch of examples does to the measure (step 3 of
`path_patching`), run or estimated (`estimates`)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.budget import gradient_bytes
from stages.circuits.estimates import estimated, slopes
from stages.circuits.patching_budget import PASS, Budget, Sizes, at_least_one, pass_limit
from stages.circuits.readout import FewTokens, Measure
from stages.circuits.recording import CleanRuns
from stages.circuits.sweep import Read, Receivers, Sweep, Tails, parts, reached, read_heads, tail_logits
from stages.circuits.walker import Walker

# bytes that one example takes beside its tail -> as many examples of a batch at once as fit, and their tails
TailsOf = Callable[[float | int], Iterator[tuple[slice, Tails]]]


@dataclass(frozen=True)
class Batch:
    """Examples whose position begins at the same token, and holds the last token or does not.

    Attributes:
        index: which examples.
        at: tokens of the position.
        length: of the prompts.
        sweep: over all of them.
        runs: for their tails, where these had to be made with the chains.
    """

    index: Int[Tensor, "n"]
    at: Int[Tensor, "n k"]
    length: int
    sweep: Sweep
    runs: CleanRuns | None

    @property
    def start(self) -> int:
        return int(self.at.min())


# (batch, its tails, receivers, depth -> how many of the swept sets have a sender below it) -> (receiver, which of the
# batch, which of the swept sets, their effects)
Reader = Callable[[Batch, TailsOf, Sequence[Receivers], list[int]], Iterator[tuple[int, slice, slice, Tensor]]]


class PathEnds:
    """Reads effects off swept batches.

    Args:
        walker: the model.
        measure: what is read from the logits.
        sizes: bytes of what is made.
        budget: the limit on them.
        clean: the measure on the clean runs; may be filled in later.
    """

    def __init__(
        self, walker: Walker, measure: Measure | FewTokens, sizes: Sizes, budget: Budget, clean: Float[Tensor, "n"]
    ) -> None:
        self._walker, self._measure, self._sizes, self._budget, self._clean = walker, measure, sizes, budget, clean

    def effects(
        self, batch: Batch, tails: TailsOf, receivers: Sequence[Receivers], joined: list[int]
    ) -> Iterator[tuple[int, slice, slice, Float[Tensor, "n f"]]]:
        """Yields (receiver, which of the batch, which of the swept sets, their effects); those that are not yielded
        have effect 0.

        Args:
            tails: those of the batch, as many examples at once as fit.
            joined: depth -> how many of the swept sets have a sender below it.
        """
        yield from self._of_logits(batch, receivers)
        heads, sets = _to_heads(receivers, joined)
        each = sets * self._sizes.read([receiver for _, receiver in heads], batch.at.shape[1])
        for few, here in tails(each) if sets else ():
            for number, receiver in heads:
                for some, part, effects in self._of_heads(batch, few, here, receiver, joined):
                    yield number, some, part, effects

    def estimates(
        self, batch: Batch, tails: TailsOf, receivers: Sequence[Receivers], joined: list[int]
    ) -> Iterator[tuple[int, slice, slice, Float[Tensor, "n f"]]]:
        """As `effects`, with slopes instead of the tails of q, k and v (`estimates`)."""
        yield from self._of_logits(batch, receivers)
        heads, sets = _to_heads(receivers, joined)
        if not sets:
            return
        layers = self._walker.n_layers - min(receiver.layers(0)[0] for _, receiver in heads)
        length = batch.length - batch.start
        each = gradient_bytes(self._walker, length, batch.length, layers) + self._sizes.slopes(length, layers)
        for few, here in tails(each):
            index = batch.index[few]
            most, size = self._pass(len(index), batch.at.shape[1] * self._sizes.in_layer())
            for alike in _with_same_slopes(heads):
                measured = partial(self.measured, index=index)
                of = slopes(self._walker, alike[0][1], here, self.tokens(index), measured)
                for (number, receiver), some in product(alike, parts(len(index), most)):
                    inside = slice(few.start + some.start, few.start + some.stop)
                    slope = {layer: slope[some] for layer, slope in of.items()}
                    found = estimated(self._walker, receiver, batch.sweep, inside, here.select(some), slope, size)
                    yield number, inside, slice(0, found.shape[1]), found.cpu()

    def tokens(self, index: Int[Tensor, "n"]) -> Int[Tensor, "n k"] | None:
        """The tokens whose logits the measure reads; None: all."""
        if not isinstance(self._measure, FewTokens):
            return None
        return self._measure.tokens[index].to(self._walker.device)

    def measured(self, logits: Float[Tensor, "n e tokens"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        """The measure, from the logits of those tokens; on the CPU."""
        logits, measure = logits.to(self._walker.logits_dtype), self._measure
        return (measure.read(logits, index) if isinstance(measure, FewTokens) else measure(logits, index)).cpu()

    def _of_logits(
        self, batch: Batch, receivers: Sequence[Receivers]
    ) -> Iterator[tuple[int, slice, slice, Float[Tensor, "n f"]]]:
        """The receivers that are the logits."""
        numbers = [number for number, receiver in enumerate(receivers) if receiver.component is None]
        last = batch.at == batch.length - 1
        if not numbers or not bool(last.any()):
            return  # frozen heads keep everything away from the last token
        streams = batch.sweep.entering(self._walker.n_layers)  # n k e d
        n, tokens, sets = streams.shape[:3]
        chain = last.int().argmax(1).to(streams.device)
        for few, part in self._passes(n, sets, self._sizes.logits()):
            rows = torch.arange(few.start, few.stop, device=streams.device)
            one = streams[few, 0, part] if tokens == 1 else streams[rows, chain[few], part]
            logits = self._walker.logits(one, self.tokens(batch.index[few]))
            for number in numbers:
                yield number, few, part, self._change(logits, batch.index[few])

    def _of_heads(
        self, batch: Batch, few: slice, tails: Tails, receiver: Receivers, joined: list[int]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "n f"]]]:
        """q, k or v receivers, for the examples `few` of the batch, whose tails these are."""
        walker, layers, n = self._walker, receiver.layers(self._walker.n_layers), few.stop - few.start
        entries = reached(walker, receiver, joined)
        read: Read = {layer: self._projected(receiver, layer, batch.sweep.entering(layer)[few]) for layer in layers}
        size = tails.length * self._sizes.in_layer() + self._sizes.logits()
        for some, part in self._passes(n, entries[-1], size):
            whole = some == slice(0, n)
            here = tails if whole else tails.select(some)
            now = read if whole else {layer: (heads, values[some]) for layer, (heads, values) in read.items()}
            inside = slice(few.start + some.start, few.start + some.stop)
            logits = tail_logits(walker, receiver, now, here, entries, part, self.tokens(batch.index[inside]))
            yield inside, part, self._change(logits, batch.index[inside])

    def _projected(
        self, receiver: Receivers, layer: int, streams: Float[Tensor, "n k e d"]
    ) -> tuple[Int[Tensor, "r"], Float[Tensor, "n k e r a"]]:
        """What receivers of a layer read, made in parts that fit a pass."""
        n, tokens, sets = streams.shape[:3]
        size = at_least_one(PASS * self._budget.limit, tokens * max(1, sets) * self._sizes.projected())
        if size >= n:
            return read_heads(self._walker, receiver, layer, streams)
        made = [read_heads(self._walker, receiver, layer, streams[few]) for few in parts(n, size)]
        return made[0][0], torch.cat([values for _, values in made])

    def _passes(self, n: int, sets: int, size: int) -> Iterator[tuple[slice, slice]]:
        """Parts of n examples by sets of senders, of which one of one takes `size` bytes, that fit a pass."""
        some, several = self._pass(n, size)
        yield from product(parts(n, some), parts(sets, several))

    def _pass(self, n: int, size: int) -> tuple[int, int]:
        """How many of n examples, by how many sets of senders, of which one of one takes `size` bytes, fit a pass."""
        limit = pass_limit(self._walker, self._budget.limit)
        few = min(n, at_least_one(limit, size))
        return few, at_least_one(limit, few * size)

    def _change(self, logits: Float[Tensor, "n e tokens"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        """Effects: the measure less that of the clean runs."""
        return self.measured(logits, index) - self._clean[index, None]


def _with_same_slopes(heads: Sequence[tuple[int, Receivers]]) -> list[list[tuple[int, Receivers]]]:
    """Receivers, with their numbers, by their slopes: those of one layer have the same, whichever of its heads they are
    and whatever they read."""
    found: dict[int | Receivers, list[tuple[int, Receivers]]] = {}
    for number, receiver in heads:
        lowest, *upper = receiver.layers(0)
        found.setdefault(receiver if upper else lowest, []).append((number, receiver))
    return list(found.values())


def _to_heads(receivers: Sequence[Receivers], joined: list[int]) -> tuple[list[tuple[int, Receivers]], int]:
    """The receivers that are heads, with their numbers, and how many sets of senders reach any."""
    heads = [(number, receiver) for number, receiver in enumerate(receivers) if receiver.component is not None]
    return heads, max((joined[receiver.layers(0)[-1]] for _, receiver in heads), default=0)
