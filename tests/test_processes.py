"""Work in forked processes: same results in the same order, and failures that are told."""

import os

import pytest
import torch

from stages.pipeline.processes import in_processes


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


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="status 7"):
        list(in_processes(lambda part: os._exit(7), range(2), 2))
