"""Path patching spread over forked processes, each with its own share of the examples.

EdgeScores are per example, so the shares are independent; each process keeps the runs and sweeps of its own. Several
processes of one thread do this faster than threads, which wait for each other after every small matrix.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.circuits.exchange import slices
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.walker import Walker
from stages.pipeline.processes import Servers


class SpreadPatcher(PathPatcher):
    """A `PathPatcher` over all examples whose work is done by one process for each share of them.

    Args:
        walker: the model.
        pairs: all prompts.
        make: the patcher of some of the examples; called in the process that will have it.
        processes: how many. Their number changes results by rounding only. The parent must have run torch with one
            thread only.

    Raises:
        Invalid: as `PathPatcher`.
        RuntimeError: a process failed.
    """

    def __init__(
        self, walker: Walker, pairs: AlignedPairs, make: Callable[[slice], PathPatcher], processes: int
    ) -> None:
        self.walker, self.pairs, self.watch = walker, pairs, None  # each process may have a patcher that is watched
        layers, heads = walker.n_layers, walker.n_heads
        self._every_head = torch.eye(layers * heads, dtype=torch.bool).view(-1, layers, heads)
        n = len(pairs.clean_ids)

        def serve(rows: slice) -> Callable[[tuple | None], list[Tensor]]:
            patcher = make(rows)

            def answer(question: tuple | None) -> list[Tensor]:
                if question is None:
                    return [patcher.clean, patcher.corrupt, patcher.clean_logits]
                return patcher.effects(*question)

            return answer

        self._servers = Servers(serve, slices(n, -(-n // processes)))
        self.clean, self.corrupt, self.clean_logits = self._ask(None, 0)

    @torch.no_grad()
    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        """As `PathPatcher.effects`."""
        return self._ask((position, senders, list(receivers)), -1)

    def _ask(self, question: tuple | None, dim: int) -> list[Tensor]:
        return [torch.cat(shares, dim) for shares in zip(*self._servers.ask(question), strict=True)]
