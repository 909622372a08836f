"""Work in forked processes: same results in the same order, and failures that are told."""

import os
from collections.abc import Callable

import pytest
import torch

from stages.pipeline.processes import Servers, in_processes
from stages.pipeline.stage import Invalid


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_results_come_in_the_order_of_the_parts(processes: int) -> None:
    weights = torch.arange(12.0).view(3, 4)  # what a fork sees without being sent it
    found = list(in_processes(lambda part: weights[part] * 2, [slice(0, 1), slice(1, 2), slice(2, 3)], processes))
    assert torch.equal(torch.cat(found), weights * 2)


def test_parts_run_in_other_processes() -> None:
    assert len({os.getpid(), *in_processes(lambda _: os.getpid(), range(4), 2)}) == 3
    assert list(in_processes(lambda _: os.getpid(), range(4), 1)) == [os.getpid()] * 4


def test_a_failure_is_raised_with_its_traceback() -> None:
    def work(part: int) -> int:
        if part == 2:
            raise ValueError("two is bad")
        return part

    results = in_processes(work, range(4), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="two is bad"):
        next(results)


def test_bad_input_is_told_in_its_own_words() -> None:
    def work(part: int) -> int:
        raise Invalid(f"{part} is not valid")

    with pytest.raises(Invalid, match="^0 is not valid$"):
        list(in_processes(work, range(4), 2))


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="status 7"):
        list(in_processes(lambda part: os._exit(7), range(2), 2))
    servers = Servers(lambda share: os._exit, [0, 1])
    with pytest.raises(RuntimeError, match="status 7"):
        servers.ask(7)
    with pytest.raises(RuntimeError, match="status 7"):  # nor does it hang when it is asked again
        servers.ask(7)


def test_more_answers_than_a_pipe_holds() -> None:
    found = list(in_processes(lambda part: torch.full((50_000,), part), range(6), 2))
    assert [int(each[0]) for each in found] == list(range(6))


def test_servers_have_an_end() -> None:
    servers = Servers(lambda share: lambda question: os.getpid(), [0, 1])
    assert servers.ask(0) == servers.pids
    servers.end()
    for pid in servers.pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_servers_keep_their_share_and_answer_in_order() -> None:
    def serve(share: int) -> Callable[[int], tuple[int, int]]:
        asked = []

        def answer(question: int) -> tuple[int, int]:
            asked.append(question)
            if question == 13:
                raise Invalid("13 is not valid")
            if question == 14:
                raise KeyError("wrong")
            return share * question, len(asked)

        return answer

    servers = Servers(serve, [1, 10])
    assert servers.ask(2) == [(2, 1), (20, 1)]
    assert servers.ask(3) == [(3, 2), (30, 2)], "a process remembers"
    with pytest.raises(Invalid, match="13 is not valid"):
        servers.ask(13)
    with pytest.raises(RuntimeError, match="KeyError: 'wrong'"):
        servers.ask(14)
    assert servers.ask(4) == [(4, 5), (40, 5)]
    assert servers.ask_each([5, 6]) == [(5, 6), (60, 6)]
    servers.end()
