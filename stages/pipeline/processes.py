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
from functools import partial
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
        Invalid: a process found bad input.
        RuntimeError: a process failed or ended; its traceback or status is in the message.
    """
    processes = min(processes, len(parts))
    if processes <= 1:
        yield from map(work, parts)
        return

    children: list[_Process] = []
    try:
        for first in range(processes):
            children.append(_Process(partial(_do, work, parts[first::processes]), children))
        for index in range(len(parts)):
            yield children[index % processes].receive()
    finally:
        for child in children:
            child.end()


class Servers(Generic[Question, Answer]):
    """Forked processes that stay: each prepares its share once, then answers questions about it.

    They end with their parent, or by `end`.

    Attributes:
        pids: of the processes.

    Args:
        serve: called in each process with its share; gives what answers there.
        shares: one for each process. The parent must have run torch with one thread only, see `in_processes`.
    """

    def __init__(self, serve: Callable[[Part], Callable[[Question], Answer]], shares: Sequence[Part]) -> None:
        self._children: list[_Process] = []
        for share in shares:
            self._children.append(_Process(partial(_serve, serve, share), self._children))
        self.pids = [child.pid for child in self._children]

    def ask(self, question: Question) -> list[Answer]:
        """The answers of all processes to one question, in the order of their shares.

        Raises:
            Invalid: a process found bad input.
            RuntimeError: a process failed or ended; its traceback or status is in the message.
        """
        return self.ask_each([question] * len(self._children))

    def ask_each(self, questions: Sequence[Question]) -> list[Answer]:
        """As `ask`, with a question for each process."""
        for child, question in zip(self._children, questions, strict=True):
            child.send(question)
        # all are read before one is looked at, so that no answer is left for the next question
        replies = [child.read() for child in self._children]
        return [_result(reply) for reply in replies]

    def end(self) -> None:
        """Stop the processes at once."""
        for child in self._children:
            child.end()


_Pipe = Any  # the class of a pipe's end depends on the platform


class _Process:
    """A forked process at the other end of a pipe; it ends with its parent.

    Args:
        talk: called in the process with its end of the pipe.
        elders: processes that were made before it, and still run.
    """

    def __init__(self, talk: Callable[[_Pipe], None], elders: "Sequence[_Process]") -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        # a fork holds the parent's ends of all pipes so far; it closes them, so that pipes end with the parent
        held = [self._pipe, *(elder._pipe for elder in elders)]
        self._process = context.Process(target=_child, args=(talk, theirs, held), daemon=True)
        self._process.start()
        theirs.close()  # only the child's copy is left, so that its death ends the pipe

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: Any) -> None:
        """Send what can be pickled.

        Raises:
            RuntimeError: the process ended.
        """
        try:
            # plain pickle copies tensors; the one of multiprocessing would share them, and they would end with us
            self._pipe.send_bytes(pickle.dumps(message))
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None

    def read(self) -> tuple[Any, Any]:
        """The next reply, for `_result`.

        Raises:
            RuntimeError: the process ended.
        """
        try:
            return pickle.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._ended() from None

    def receive(self) -> Any:
        """The result of the next reply.

        Raises:
            Invalid: the process found bad input.
            RuntimeError: the process failed or ended.
        """
        return _result(self.read())

    def end(self) -> None:
        """Stop the process at once."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def _ended(self) -> RuntimeError:
        self._process.join()
        return RuntimeError(f"a process ended with status {self._process.exitcode}")


def _child(talk: Callable[[_Pipe], None], pipe: _Pipe, held: Sequence[_Pipe]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes Ctrl-C and ends its children
    for end in held:
        end.close()
    try:
        talk(pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        pass


def _do(work: Callable[[Part], Any], parts: Sequence[Part], pipe: _Pipe) -> None:
    for part in parts:
        _reply(pipe, partial(work, part))


def _serve(serve: Callable[[Part], Callable[[Question], Any]], share: Part, pipe: _Pipe) -> None:
    prepared: list[Callable[[Question], Any]] = []  # with the first question, so that its failure is an answer

    def answer(question: Question) -> Any:
        if not prepared:
            prepared.append(serve(share))
        return prepared[0](question)

    while True:
        _reply(pipe, partial(answer, pickle.loads(pipe.recv_bytes())))


def _reply(pipe: _Pipe, work: Callable[[], Any]) -> None:
    """Send what `work` gives, or how it failed."""
    try:
        reply = pickle.dumps((None, work()))
    except Invalid as error:
        reply = pickle.dumps((error, None))
    except BaseException:
        reply = pickle.dumps((RuntimeError(f"a process failed:\n{traceback.format_exc()}"), None))
    pipe.send_bytes(reply)


def _result(reply: tuple[Any, Any]) -> Any:
    """What the work gave; raises what it failed with."""
    failure, result = reply
    if failure is not None:
        raise failure
    return result
