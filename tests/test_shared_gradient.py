"""One batch's gradient from several processes: the same bits as from one, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stages.learning.shared_gradient import SharedGradient

PIECES = list(torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0)))


def trained(processes: int) -> tuple[list[Tensor], list[float]]:
    """Weights and losses after three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with SharedGradient(model, lambda piece: model(piece).square().sum(), 5, processes) as gradient:
        optimiser = torch.optim.AdamW([gradient.weights], lr=0.1)
        losses = []
        for batch in (PIECES, PIECES[:3], PIECES[1:]):
            losses.append(gradient.compute(batch))
            optimiser.step()
    return list(model.parameters()), losses


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_the_number_of_processes_changes_no_bit(processes: int) -> None:
    weights, losses = trained(1)
    others, other_losses = trained(processes)
    assert other_losses == losses
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_it_is_the_gradient_of_the_whole_batch_and_an_optimiser_moves_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    loss = model(torch.cat(PIECES)).square().sum()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with SharedGradient(model, lambda piece: model(piece).square().sum(), 5, 2) as gradient:
        assert gradient.compute(PIECES) == pytest.approx(loss.item(), rel=1e-6)
        assert gradient.weights.grad is not None
        torch.testing.assert_close(gradient.weights.grad, expected)
        torch.optim.SGD([gradient.weights], lr=1.0).step()
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(after, torch.cat([weight.flatten() for weight in before]) - expected)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == len(before)  # each has its own again


def pids(gradient: SharedGradient) -> list[int | None]:
    assert gradient._servers is not None
    return gradient._servers.pids


def test_failures_and_deaths_are_told_and_leave_no_process() -> None:
    model = nn.Linear(3, 1)
    children = []

    def fails(piece: Tensor) -> Tensor:
        raise ValueError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"), SharedGradient(model, fails, 5, 2) as gradient:
        children += pids(gradient)
        gradient.compute(PIECES)
    with (
        pytest.raises(RuntimeError, match="ended with status 7"),
        SharedGradient(model, lambda piece: os._exit(7), 5, 2) as gradient,
    ):
        children += pids(gradient)
        gradient.compute(PIECES)
    assert len(children) == 4 and not any(map(is_running, children))


ENDLESS = """
import signal
import torch
from stages.learning.shared_gradient import SharedGradient
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it from birth
model = torch.nn.Linear(3, 1)
with SharedGradient(model, lambda piece: model(piece).sum(), 2, 2) as gradient:
    print(*gradient._servers.pids, flush=True)
    while True:
        gradient.compute([torch.ones(1, 3)] * 2)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_their_parent(end: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    time.sleep(0.1)
    if end == signal.SIGINT:
        os.killpg(parent.pid, end)  # as a terminal does
    else:
        parent.send_signal(end)
    parent.wait(20)
    for _ in range(200):
        if not any(map(is_running, children)):
            return
        time.sleep(0.05)
    raise AssertionError("a process outlived its parent")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # an ended process that its parent, gone or not, has not read yet is no running one
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
