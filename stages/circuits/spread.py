"""Path patching spread over forked processes, each with its own share of the examples.

Effects are per example, so the shares are independent; each process keeps the runs and sweeps of its own. Several
processes of one thread do this faster than threads, which wait for each other after every small matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.exchange import slices
from stages.circuits.pairs import AlignedPairs, Pairs
from stages.circuits.patcher import Patcher, Progress
from stages.circuits.path_patching import PathPatcher
from stages.circuits.scores import Metric, measure_of
from stages.circuits.sweep import Receivers
from stages.circuits.walker import Walker
from stages.pipeline.processes import Servers

Self = TypeVar("Self", bound="Paired")


class SpreadPatcher(Patcher):
    """A `Patcher` over all examples whose work is done by one process for each share of them.

    Args:
        walker: the model.
        pairs: all prompts.
        make: the patcher of some of the examples; called in the process that will have it.
        processes: how many. Their number changes results by rounding only. The parent must have run torch with one
            thread only.

    Raises:
        Invalid: as the patchers.
        RuntimeError: a process failed.
    """

    def __init__(
        self, walker: Walker, pairs: AlignedPairs | Pairs, make: Callable[[slice], Patcher], processes: int
    ) -> None:
        self.walker, self.pairs = walker, pairs
        self.watch: Callable[[Progress], None] | None = None  # each process may have a patcher that is watched
        n = len(pairs)

        def serve(rows: slice) -> Callable[[tuple], list[Tensor]]:
            patcher = make(rows)

            def answer(question: tuple) -> list[Tensor]:
                what, *given = question
                return getattr(patcher, what)(*given) if given else [getattr(patcher, what)]

            return answer

        self._servers = Servers(serve, slices(n, -(-n // processes)))
        (self.clean,), (self.corrupt,) = self._ask(("clean",), 0), self._ask(("corrupt",), 0)

    @property
    def correct(self) -> Bool[Tensor, "n"]:
        return self._ask(("correct",), 0)[0]

    @property
    def positions(self) -> Mapping[str, Int[Tensor, "n ..."]]:
        return self.pairs.positions

    @torch.no_grad()
    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        """As `Patcher.effects`."""
        return self._ask(("effects", position, senders, list(receivers)), -1)

    def estimates(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "layers h n"]]:
        """As `Patcher.estimates`."""
        return self._ask(("estimates", position, list(receivers)), -1)

    def _ask(self, question: tuple, dim: int) -> list[Tensor]:
        return [torch.cat(shares, dim) for shares in zip(*self._servers.ask(question), strict=True)]


def spread_patcher(
    walker: Walker, pairs: AlignedPairs | Pairs, make: Callable[[slice], Patcher], processes: int
) -> Patcher:
    """A patcher over all examples; of one process, in this one. Arguments and errors as `SpreadPatcher`."""
    return make(slice(None)) if processes == 1 else SpreadPatcher(walker, pairs, make, processes)


@runtime_checkable
class Paired(Protocol):
    """Prompts with answers and corrupt partners, as the sets of tasks are."""

    @property
    def input_ids(self) -> Int[Tensor, "n t"]: ...
    @property
    def answer(self) -> Int[Tensor, " n"]: ...
    @property
    def others(self) -> Int[Tensor, "n k"]: ...
    @property
    def positions(self) -> Mapping[str, Int[Tensor, "n ..."]]: ...
    @property
    def corrupt_ids(self) -> Int[Tensor, "n u"]: ...
    @property
    def corrupt_positions(self) -> Mapping[str, Int[Tensor, "n ..."]]: ...
    def select(self: Self, index: Any) -> Self: ...


def aligned(examples: Paired) -> AlignedPairs:
    """The pairs alone."""
    return AlignedPairs(examples.input_ids, examples.corrupt_ids, examples.positions, examples.corrupt_positions)


def patcher_of(
    walker: Walker,
    examples: Paired,
    metric: Metric,
    memory_mib: float,
    processes: int,
    watch: Callable[[], Callable[[Progress], None]] | None = None,
) -> Patcher:
    """A `spread_patcher` over the examples that measures what a metric is computed from.

    Args:
        memory_mib: how much memory each process may take beside the model.
        watch: makes what watches the patcher of the first share, which tells how far all are, as shares are equal.
    """

    def make(rows: slice) -> PathPatcher:
        part = examples.select(rows)
        patcher = PathPatcher(walker, aligned(part), measure_of(metric, part.answer, part.others), memory_mib)
        if watch is not None and not rows.start:
            patcher.watch = watch()
        return patcher

    return spread_patcher(walker, aligned(examples), make, processes)
