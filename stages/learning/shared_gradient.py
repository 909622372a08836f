"""The gradient of one batch, worked out piece by piece in several processes.

Several threads inside the matrices of a small model leave most of a processor idle; several processes of one
thread each, on different pieces of a batch, do not. The processes are forked and share two blocks of memory
with their parent: the weights, which the parent's optimiser moves, and one row for the gradient of each piece.
A row is the same whoever fills it, and the parent always adds the rows in one order, so the result has the
same bits whatever the number of processes.
"""

import math
import mmap
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.pipeline.processes import Servers

Piece = TypeVar("Piece")


class SharedGradient(Generic[Piece]):
    """A context in which the weights of a model are one vector, and gradients come from all processes.

    Attributes:
        weights: all weights of the model, to be given to the optimiser; a step of it moves the model. After
            the context the model is on its own again.
    """

    weights: nn.Parameter

    def __init__(self, model: nn.Module, loss: Callable[[Piece], Tensor], most_pieces: int, processes: int):
        """Move the weights of the model to shared memory and start the processes.

        Args:
            model: its weights are float32 and all of them matter to each piece.
            loss: of one piece, by this model; the losses of a batch's pieces add up to its loss.
            most_pieces: that a batch can have.
            processes: 1 does all the work here. More need a parent that has run torch with one thread only,
                because the threads of a parent do not exist in its fork.
        """
        self._parameters = list(model.parameters())
        self._loss = loss
        size = sum(parameter.numel() for parameter in self._parameters)
        self._rows = _shared_memory(most_pieces * size).view(most_pieces, size)
        flat = _shared_memory(size)
        flat.copy_(_as_vector([parameter.detach() for parameter in self._parameters]))
        for parameter, part in zip(self._parameters, flat.split([p.numel() for p in self._parameters]), strict=True):
            parameter.data = part.view(parameter.shape)
        self.weights = nn.Parameter(flat)
        self._processes = min(processes, most_pieces)
        self._servers = Servers(lambda _: self._fill_all, range(self._processes)) if self._processes > 1 else None

    def __enter__(self) -> "SharedGradient[Piece]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._servers is not None:
            self._servers.end()
        for parameter in self._parameters:  # tensors of one storage cannot be saved
            parameter.data = parameter.data.clone()

    def compute(self, pieces: Sequence[Piece]) -> float:
        """Set `weights.grad` to the gradient of the summed losses; returns that sum.

        Raises:
            RuntimeError: a process failed or ended; its traceback or status is in the message.
        """
        work = list(enumerate(pieces))
        if self._servers is None:
            losses = self._fill_all(work)
        else:
            shares = _shares(len(pieces), self._processes)
            filled = self._servers.ask_each([[work[row] for row in share] for share in shares])
            losses = [loss for part in filled for loss in part]
        self.weights.grad = self._rows[: len(pieces)].sum(dim=0)
        return math.fsum(losses)  # exact, so in any order

    def _fill_all(self, work: list[tuple[int, Piece]]) -> list[float]:
        """Fill rows with the gradients of pieces; returns their losses."""
        losses = []
        for row, piece in work:
            loss = self._loss(piece)
            self._rows[row] = _as_vector(torch.autograd.grad(loss, self._parameters))
            losses.append(float(loss.detach()))
        return losses


def _shared_memory(size: int) -> Float[Tensor, "size"]:
    """Zeros in memory that forked processes share; without a file, so nothing is left behind on any end."""
    return torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.float32)


def _as_vector(tensors: Sequence[Tensor]) -> Float[Tensor, "size"]:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _shares(pieces: int, processes: int) -> list[list[int]]:
    """Pieces of each process, dealt to and fro (0 1 1 0 0 1 ...): as pieces grow, the shares stay equal."""
    turns = [*range(processes), *reversed(range(processes))]
    return [[piece for piece in range(pieces) if turns[piece % len(turns)] == own] for own in range(processes)]
