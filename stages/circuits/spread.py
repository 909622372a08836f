"""Path patching spread over forked processes, each with its own share of the examples.

Effects are per example, so the shares are independent; each process keeps the runs and sweeps of its own. Several
processes of one thread do this faster than threads, which wait for each other after every small matrix.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.exchange import slices
from stages.circuits.pairs import AlignedPairs, Pairs
from stages.circuits.patcher import Patcher, Progress
from stages.circuits.sweep import Receivers
from stages.circuits.walker import Walker
from stages.pipeline.processes import Servers


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
