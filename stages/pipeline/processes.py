"""Independent parts of one stage's work in forked processes.

Small models leave most of a processor idle when several threads share one of their small matrices; several
processes of one thread each, on different examples, do not. A forked process starts at once and sees everything
that its parent has computed, so a part needs no arguments but its own name.
"""

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from stages.pipeline.stage import Invalid

Part = TypeVar("Part")
Result = TypeVar("Result")
Question = TypeVar("Question")
Answer = TypeVar("Answer")


def in_processes(work: Callable[[Part], Result], parts: Sequence[Part], processes: int) -> Iterator[Result]:
    """The results of `work` for all parts, in their order, whatever the number of processes.

    Process p of P does the parts p, p + P, p + 2 P, ... So parts should be of similar size.

    Args:
        work: may read anything that exists now; what it changes is lost.
        parts: what it is called with.
        processes: 1 does the work here. More need a parent that has run torch with one thread only, because
            the threads of a parent do not exist in its fork.

    Raises:
        RuntimeError: a process failed; its traceback is in the message.
    """
    processes = min(processes, len(parts))
    if processes <= 1:
        yield from map(work, parts)
        return
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    children = [
        context.Process(target=_child, args=(work, parts[first::processes], pipes, first), daemon=True)
        for first in range(processes)
    ]
    for child in children:
        child.start()
    for _, send in pipes:
        send.close()  # only the children's copies are left, so that their death ends the pipe
    try:
        for index in range(len(parts)):
            try:
                failed, result = pickle.loads(pipes[index % processes][0].recv_bytes())
            except EOFError:
                children[index % processes].join()
                raise RuntimeError(f"a process ended with status {children[index % processes].exitcode}") from None
            if failed:
                raise RuntimeError(f"a process failed:\n{result}")
            yield result
    finally:
        for child in children:
            child.terminate()
            child.join()


class Servers(Generic[Question, Answer]):
    """Forked processes that stay: each prepares its share once, then answers the same questions about it.

    Args:
        serve: called in each process with its share; gives what answers there.
        shares: one for each process. The parent must have run torch with one thread only, see `in_processes`.
    """

    def __init__(self, serve: Callable[[Part], Callable[[Question], Answer]], shares: Sequence[Part]) -> None:
        context = multiprocessing.get_context("fork")
        self._connections: list[Any] = []  # their class depends on the platform
        for share in shares:
            ours, theirs = context.Pipe()
            # daemons end with the parent; a process that is born later holds the ends of its elders, so it closes them
            process = context.Process(
                target=_serve, args=(serve, share, theirs, [*self._connections, ours]), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)

    def ask(self, question: Question) -> list[Answer]:
        """The answers of all processes, in the order of their shares.

        Raises:
            Invalid: a process found bad input.
            RuntimeError: a process failed; its traceback is in the message.
        """
        for connection in self._connections:
            connection.send_bytes(pickle.dumps(question))
        replies = []
        for connection in self._connections:
            try:
                replies.append(pickle.loads(connection.recv_bytes()))
            except EOFError:
                raise RuntimeError("a process ended without an answer") from None
        for failed, answer in replies:
            if isinstance(failed, Invalid):
                raise failed
            if failed:
                raise RuntimeError(f"a process failed:\n{answer}")
        return [answer for _, answer in replies]


def _serve(
    serve: Callable[[Part], Callable[[Question], Answer]], share: Part, connection: Any, others: list[Any]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes Ctrl-C and ends its children
    for other in others:
        other.close()
    answer = None
    try:
        while True:
            question = pickle.loads(connection.recv_bytes())
            try:
                answer = answer or serve(share)
                reply = (False, answer(question))
            except Invalid as error:
                reply = (error, "")
            except BaseException:
                reply = (True, traceback.format_exc())
            connection.send_bytes(pickle.dumps(reply))
    except (EOFError, BrokenPipeError):  # the parent has no more questions
        pass


def _child(
    work: Callable[[Part], Result], parts: Sequence[Part], pipes: list[tuple[Connection, Connection]], own: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes Ctrl-C and ends its children
    for receive, _ in pipes:
        receive.close()  # so that a send fails when the parent is gone
    send = pipes[own][1]
    for other, (_, end) in enumerate(pipes):
        if other != own:
            end.close()
    try:
        for part in parts:
            # plain pickle copies tensors; the one of multiprocessing would share them, and they would end with us
            send.send_bytes(pickle.dumps((False, work(part))))
    except BrokenPipeError:
        pass
    except BaseException:
        send.send_bytes(pickle.dumps((True, traceback.format_exc())))
