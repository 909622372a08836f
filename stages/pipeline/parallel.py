"""Bring the working copy up to date as `dvc repro` does, several cells at a time.

    python -m stages.pipeline.parallel [--workers N] [TARGET ...]

DVC runs one cell at a time, and around each it reads and writes all of dvc.lock, on one core. But it takes several
`dvc repro` in one working copy, as long as their targets do not depend on each other. So the stale cells are dealt out
in rounds: whatever a round needs is done before it, and the jobs of a round share no cell. What is left, and all where
little is stale, plain `dvc repro` does. Results are the same bytes; only the order of entries in a new dvc.lock may
differ. The last line of each worker is shown while it runs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import product
from typing import IO, Any

from tqdm import tqdm

from stages.pipeline.command import DVC, exit_status
from stages.pipeline.params import load_params
from stages.pipeline.resources import resources
from stages.pipeline.stage import PARAMS_FILE, Invalid

WAITING = [*DVC, "--wait-for-lock"]  # which the other workers hold for a second now and then
FIRST = "pretrain"  # each base takes all cores
OF_ARM = ("match", "discover", "evaluate", "matchings", "dcm", "cmap", "drift")  # cells of one tuned model, in order
OF_BASE = ("evaluate_base", "dcm_base")

_MOVES = re.compile("\x1b\\[[0-9;]*[A-Za-z]")  # of the cursor, and colours
Job = tuple[str, ...]  # cells that run one after another


def rounds(params: Any) -> tuple[list[Job], list[Job]]:
    """The cells between the bases and the statistics, in two rounds of jobs that do not depend on each other."""
    runs = product(params.arms, params.seeds, params.learning_rates)
    first = [(f"finetune@{arm}-{seed}-{rate}",) for arm, seed, rate in runs]
    first += [(f"discover_base@{seed}",) for seed in params.seeds]
    second = [tuple(f"{stage}@{arm}-{seed}" for stage in OF_ARM) for arm in params.arms for seed in params.seeds]
    second += [tuple(f"{stage}@{seed}" for stage in OF_BASE) for seed in params.seeds]
    return first, second


def dealt(jobs: Sequence[Job], workers: int) -> list[list[str]]:
    """The cells of each worker."""
    return [[cell for job in jobs[worker::workers] for cell in job] for worker in range(min(workers, len(jobs)))]


def bring_up_to_date(workers: int, targets: Sequence[str] = ()) -> int:
    """Run whatever is stale, or, of the statistics and the report, the targets alone; returns the exit status."""
    params = load_params(PARAMS_FILE)
    resources()  # what the cells would refuse is refused here
    stale = _stale()
    if not stale:
        print("Data and pipelines are up to date.")
        return 0
    first, second = rounds(params)
    if any(cell.partition("@")[0] in (FIRST, "synthesize", "source", "code") for cell in stale):
        status = subprocess.run([*WAITING, "repro", FIRST]).returncode
        if status:
            return status
        stale = _stale()
    fed = {_seed(cell) for (cell,) in first if cell in stale}  # seeds whose second round reads what the first changes
    first = [job for job in first if not stale.isdisjoint(job)]
    second = [job for job in second if not stale.isdisjoint(job) or _seed(job[0]) in fed]
    for wanted in (first, second):
        if len(wanted) > 1:
            status = _run_workers(dealt(wanted, workers))
            if status:
                return status
    return subprocess.run([*WAITING, "repro", *targets]).returncode


def _seed(cell: str) -> str:
    """Of a cell named <stage>@<seed>, <stage>@<arm>-<seed> or <stage>@<arm>-<seed>-<learning rate>."""
    return cell.partition("@")[2].split("-")[:2][-1]


def _stale() -> set[str]:
    """Cells whose own dependencies, params or outputs changed; those that depend on them are not among them yet."""
    found = subprocess.run([*WAITING, "status", "--json"], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise Invalid("dvc status failed; what it printed is above")
    return set(json.loads(found.stdout))


def _run_workers(shares: Sequence[Sequence[str]]) -> int:
    """Run the cells of all workers at the same time; returns the exit status of the first that failed, or 0."""
    running = []
    for number, cells in enumerate(shares):
        command = [*WAITING, "repro", "--single-item", *cells]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert worker.stdout is not None
        line = tqdm(bar_format="{desc}", position=number, leave=False, disable=not sys.stderr.isatty())
        reader = threading.Thread(target=_show, args=(worker.stdout, line))
        reader.start()
        running.append((worker, reader))
    status = 0
    for worker, reader in running:
        reader.join()  # Ctrl-C reaches the workers, too
        status = status or worker.wait()
    return status


def _show(stream: IO[bytes], line: tqdm) -> None:
    """Print the lines of a worker. Progress, which rewrites its line, has a place of its own while it lasts, and then
    its last state is printed."""
    last = ""
    for text, progress in _lines(stream):
        if progress:
            plain = _MOVES.sub("", text).strip()
            line.set_description_str(plain[:120])
            if plain and plain == text:  # a bar below another one moves back up
                last = plain
        elif text:
            if last:
                tqdm.write(last)
                last = ""
            tqdm.write(text)
    if last:
        tqdm.write(last)
    line.close()


def _lines(stream: IO[bytes]) -> Iterator[tuple[str, bool]]:
    """Texts between carriage returns and line feeds, and whether it was the former that they began after."""
    rest, progress = b"", False
    while part := os.read(stream.fileno(), 4096):
        *done, rest = re.split(rb"(?<=[\r\n])", rest + part)
        for text in done:
            yield text.decode(errors="replace").strip(), progress
            progress = text.endswith(b"\r")
    if rest.strip():
        yield rest.decode(errors="replace").strip(), progress


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages.pipeline.parallel", description="Bring the working copy up to date."
    )
    parser.add_argument("--workers", type=int, default=2, help="cells at the same time, each with its processes")
    parser.add_argument("targets", nargs="*", help="what to end with; everything unless given")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    return exit_status(lambda: bring_up_to_date(arguments.workers, arguments.targets))


if __name__ == "__main__":
    raise SystemExit(main())
