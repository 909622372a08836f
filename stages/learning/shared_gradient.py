"""The gradient of one batch, worked out piece by piece in several processes.

Several threads inside the matrices of a small model leave most of a processor idle; several processes of one
thread each, on different pieces of a batch, do not. The processes are forked and share two blocks of memory
with their parent: the weights, which the parent's optimiser moves, and one row for the gradient of each piece.
A row is the same whoever fills it, and the parent always adds the rows in one order, so the result has the
same bits whatever the number of processes.
"""

import math
import mmap
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from types import TracebackType
from typing import Generic, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
        self._children: list[tuple[ForkProcess, Connection]] = []
        processes = min(processes, most_pieces)
        for _ in range(processes if processes > 1 else 0):
            self._start()

    def __enter__(self) -> "SharedGradient[Piece]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child, pipe in self._children:
            child.terminate()
            child.join()
            pipe.close()
        for parameter in self._parameters:  # tensors of one storage cannot be saved
            parameter.data = parameter.data.clone()

    def compute(self, pieces: Sequence[Piece]) -> float:
        """Set `weights.grad` to the gradient of the summed losses; returns that sum.

        Raises:
            RuntimeError: a process failed or ended; its traceback or status is in the message.
        """
        if self._children:
            shares = _shares(len(pieces), len(self._children))
            for (child, pipe), share in zip(self._children, shares, strict=True):
                try:
                    # plain pickle copies tensors; the one of multiprocessing would share them through files
                    pipe.send_bytes(pickle.dumps([(row, pieces[row]) for row in share]))
                except (BrokenPipeError, ConnectionResetError):
                    raise _ended(child) from None
            losses = dict(loss for child, pipe in self._children for loss in _receive(child, pipe))
        else:
            losses = dict(self._fill(row, piece) for row, piece in enumerate(pieces))
        self.weights.grad = self._rows[: len(pieces)].sum(dim=0)
        return math.fsum(losses.values())  # exact, so in any order

    def _fill(self, row: int, piece: Piece) -> tuple[int, float]:
        loss = self._loss(piece)
        self._rows[row] = _as_vector(torch.autograd.grad(loss, self._parameters))
        return row, float(loss.detach())

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        child = context.Process(target=self._child, args=(theirs, ours), daemon=True)
        child.start()
        theirs.close()  # only the child's copy is left, so that its death ends the pipe
        self._children.append((child, cast(Connection, ours)))

    def _child(self, pipe: Connection, end_of_parent: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes Ctrl-C and ends its children
        for end in [end_of_parent, *(end for _, end in self._children)]:
            end.close()  # so that the pipe ends when the parent is gone
        try:
            while True:
                work: list[tuple[int, Piece]] = pickle.loads(pipe.recv_bytes())
                try:
                    done = [self._fill(row, piece) for row, piece in work]
                except Exception:
                    pipe.send_bytes(pickle.dumps(traceback.format_exc()))
                else:
                    pipe.send_bytes(pickle.dumps(done))
        except (EOFError, OSError):  # the parent is gone
            pass


def _shared_memory(size: int) -> Float[Tensor, "size"]:
    """Zeros in memory that forked processes share; without a file, so nothing is left behind on any end."""
    return torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.float32)


def _as_vector(tensors: Sequence[Tensor]) -> Float[Tensor, "size"]:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _shares(pieces: int, processes: int) -> list[list[int]]:
    """Pieces of each process, dealt to and fro (0 1 1 0 0 1 ...): as pieces grow, the shares stay equal."""
    turns = [*range(processes), *reversed(range(processes))]
    return [[piece for piece in range(pieces) if turns[piece % len(turns)] == own] for own in range(processes)]


def _receive(child: ForkProcess, pipe: Connection) -> list[tuple[int, float]]:
    try:
        answer = pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        raise _ended(child) from None
    if isinstance(answer, str):
        raise RuntimeError(f"a process failed:\n{answer}")
    return answer


def _ended(child: ForkProcess) -> RuntimeError:
    child.join()
    return RuntimeError(f"a process ended with status {child.exitcode}")
