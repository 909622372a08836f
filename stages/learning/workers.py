"""Runs of one cell in parallel, one process for each learning rate.

The parent imports nothing heavy, so the workers start at once; they report over a pipe, and the parent draws
the progress bar. Workers ignore Ctrl-C: the parent takes it and stops them. A worker whose parent is gone
stops at its next report.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from stages.learning.settings import CurveRow, Training
from stages.pipeline.memory import keep_freed_memory
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class Job:
    """One run, as it is sent to a worker.

    Attributes:
        index: of the learning rate in the grid; names the folder `lr<index>` in `folder`.
        section: params of the arm.
        base, train, rehearsal, old, new: paths of the base, the training splits of the new and the old task, and both
            selection splits.
        device: where the model is trained.
    """

    arm: str
    seed: int
    index: int
    learning_rate: float
    training: Training
    section: Any
    base: Path
    train: Path
    rehearsal: Path
    old: Path
    new: Path
    folder: Path
    device: str = field(default="cpu", kw_only=True)


def run_jobs(jobs: list[Job], parallel: int) -> list[list[CurveRow]]:
    """Run all jobs, at most `parallel` at a time; returns the curve rows of each, in order.

    Raises:
        Invalid: as raised in a worker.
        RuntimeError: a worker failed; its traceback is in the message.
    """
    # a fork is ready at once where the packages are there already (`pipeline/warm_start.py`); the parent runs no torch
    forks = "trl" in sys.modules
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    waiting = list(enumerate(jobs))
    running: dict[Any, tuple[int, Job, BaseProcess]] = {}  # by the reading end of the worker's pipe
    results: dict[int, list[CurveRow]] = {}
    steps, scores = dict.fromkeys(range(len(jobs)), 0), dict.fromkeys(range(len(jobs)), "starts")
    title = f"{jobs[0].arm} seed {jobs[0].seed}"
    bar = tqdm(total=sum(job.training.steps for job in jobs), desc=title, unit="step")
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                number, job = waiting.pop(0)
                receive, send = context.Pipe(duplex=False)
                held = [receive, *running] if forks else []
                process = context.Process(target=_work, args=(job, send, held), daemon=True)
                process.start()
                send.close()  # the worker's end lives in the worker alone, so that its death ends the pipe
                running[receive] = (number, job, process)
            for receive in cast(Iterable[Any], wait(running)):
                number, job, process = running[receive]
                try:
                    kind, message = receive.recv()
                except EOFError:
                    process.join()
                    raise RuntimeError(f"a worker ended with status {process.exitcode}, no result") from None
                if kind == "invalid":
                    raise Invalid(message)
                if kind == "failed":
                    raise RuntimeError(f"a worker failed:\n{message}")
                if kind == "step":
                    steps[number], old, new = message
                    scores[number] = f"lr {job.learning_rate:g}: old {old:.2f} new {new:.2f}"
                else:
                    steps[number], results[number] = job.training.steps, message
                    process.join()
                    receive.close()
                    del running[receive]
                bar.set_postfix_str(", ".join(scores.values()), refresh=False)
                bar.update(sum(steps.values()) - bar.n)
    finally:
        for _, _, process in running.values():
            process.terminate()
            process.join()
        bar.close()
    return [results[number] for number in range(len(jobs))]


def _work(job: Job, send: Connection, held: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for end in held:  # a fork's copies of the parent's ends, which must be the only ones for pipes to end with it
        end.close()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported
    keep_freed_memory()
    try:
        from stages.learning.worker import run_job

        def report(step: int, row: CurveRow) -> None:
            send.send(("step", (step, row["old_accuracy"], row["new_accuracy"])))

        send.send(("done", run_job(job, report)))
    except Invalid as error:
        send.send(("invalid", str(error)))
    except BrokenPipeError:  # the parent is gone; nobody is left to tell
        pass
    except BaseException:
        send.send(("failed", traceback.format_exc()))
