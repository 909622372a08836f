"""Run a preset beside the working copy, so that nothing of it is touched.

    python -m stages.pipeline.preset smoke                        in a temporary clone, deleted by nobody
    python -m stages.pipeline.preset full                         in build/full; its report goes to reports/full/
    python -m stages.pipeline.preset full --name precedes -S new_task=precedes

A preset, `stages/presets/<preset>.yaml`, is a difference on the params.yaml that is here (see
`stages/pipeline/overrides.py`); -S changes single params, in the syntax of `dvc exp run -S`. DVC runs one stage at a
time, so every seed gets a clone with its own dvc.lock, all with the cache of the working copy, and as many of them run
at the same time as there are cores, with one process each unless STAGES_PROCESSES says otherwise; where there are more
cores than seeds, several cells of a seed do. When they are done their locks are put together in one more clone, whose
`dvc repro` finds every cell done and writes the report. Stopped at any time (Ctrl-C), the same command goes on with the
cells that it was at. Before it starts it says what it will cost.

Beside the report lie the records that it was made from, reports/<name>/records, a file for every seed, which is written
as soon as the seed is done. With --recorded a seed that has them is not run, where code and params are the same: so the
report can be made again, or seeds added to it, in minutes and on another machine.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from stages.pipeline.command import DVC, exit_status
from stages.pipeline.cost import estimate, progress, slowness, table
from stages.pipeline.files import write_text
from stages.pipeline.overrides import PRESETS, compose, preset_names
from stages.pipeline.params import load_params
from stages.pipeline.records import CELL_STAGES, CELLS, FIRST_STAGES, LOCK, pack, restore
from stages.pipeline.resources import PROCESSES, resources
from stages.pipeline.stage import PARAMS_FILE

WARM = [sys.executable, "-m", "stages.pipeline.warm_start"]
REPRO = [*WARM, *DVC, "repro"]
PARALLEL = [*WARM, sys.executable, "-m", "stages.pipeline.parallel"]
ENTRY = re.compile(r"^  (\S+):$", re.MULTILINE)  # of a cell in a lock
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, in C
RESULTS = ("report.html", "report.md", "summary.json", "statistics.json", "cells.csv", "figures")


def copy_with_preset(destination: Path, preset: Path, changes: Sequence[str]) -> None:
    """Bring a clone to the state of this working copy, uncommitted changes included, with a preset in its params.yaml.

    Args:
        destination: folder of the clone, made if it is not there; what the pipeline has written in it stays.
        preset: a file of what differs from params.yaml.
        changes: overrides of single params, as `dvc exp run -S` takes them.

    Raises:
        Invalid: preset or changes do not fit params.yaml; nothing has been written then.
    """
    source = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        composed = Path(folder) / PARAMS_FILE
        compose(source / PARAMS_FILE, composed, source / preset, changes)
        params = composed.read_bytes()
    if not destination.exists():
        subprocess.run(["git", "clone", "--quiet", str(source), str(destination)], check=True)
        (destination / "dvc.lock").unlink(missing_ok=True)  # it describes another preset
    here, there = _files(source), _files(destination)
    written = {"dvc.lock", *(f"reports/{name}" for name in RESULTS)}  # by the pipeline
    for name in sorted(here | there):
        if name in written or name.startswith("reports/figures/"):
            continue
        if name in here:
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, destination / name)
        else:
            (destination / name).unlink(missing_ok=True)
    (destination / PARAMS_FILE).write_bytes(params)


def _files(root: Path) -> set[str]:
    """Tracked and untracked files that git does not ignore and that exist."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {name for name in listed.split("\0") if name and (root / name).is_file()}


def run_preset(preset: str, name: str, changes: Sequence[str], workers: int, recorded: bool) -> int:
    """Run a preset in build/<name> and copy its results to reports/<name>; returns the exit status.

    Args:
        preset: name of a file in stages/presets.
        name: of the folders.
        changes: overrides of single params, as `dvc exp run -S` takes them.
        workers: cells that run at the same time, of different seeds.
        recorded: seeds that have not run here and have records in reports/<name>/records are taken from these.
    """
    resources()  # what the cells would refuse is refused here
    folder, file = Path("build") / name, PRESETS / f"{preset}.yaml"
    whole = folder / "whole"
    copy_with_preset(whole, file, changes)
    params = load_params(whole / PARAMS_FILE)
    clones = {seed: folder / f"seed{seed}" for seed in params.seeds}
    for seed, clone in clones.items():
        copy_with_preset(clone, file, [*changes, f"seeds=[{seed}]"])
    for clone in (whole, *clones.values()):
        _share_cache(clone, Path.cwd() / ".dvc" / "cache")
    # before the seeds, which would do the same at the same time: DVC fails where two write one entry of its run cache
    subprocess.run([*DVC, "repro", "--quiet", *FIRST_STAGES], cwd=whole, check=True)
    report = Path("reports") / name
    archives = {seed: report / "records" / f"seed{seed}.tar.xz" for seed in clones}
    known = []  # seeds that need not run
    if recorded:
        known = [seed for seed, clone in clones.items() if restore(archives[seed], clone)]
        print(f"from records: {known or 'no seed'}")
    measured = params.source.kind == "curriculum"  # bases for which costs were measured
    costs, done = estimate(params, slowness(params) if measured else 1.0), _cells(clones.values())
    print(table(costs, min(workers, len(clones)), done) if measured else progress(costs, done), flush=True)
    # all but contrast and report
    if not _run_cells(clones, known, archives, workers, folder, done, total=costs["dvc"][0] - 2):
        return 1
    lock = {"schema": "2.0", "stages": _joined((whole, *clones.values()))}
    write_text(whole / LOCK, yaml.safe_dump(lock, sort_keys=False))
    # the report needs the records alone, and seeds that come from records have nothing else: some of a seed's models,
    # which a checkout brings where they equal another seed's, would look like models that have changed
    subprocess.run(["git", "clean", "-fdXq", "models", str(CELLS)], cwd=whole, check=True)
    for clone in clones.values():
        shutil.copytree(clone / CELLS, whole / CELLS, dirs_exist_ok=True)
    status = subprocess.run([*REPRO, "--allow-missing"], cwd=whole).returncode
    if status:
        return status
    _publish(whole, report)
    return 0


def _share_cache(clone: Path, cache: Path) -> None:
    """Let a clone keep its outputs in a cache that is there, as links where the file system can: each exists once."""
    for option, value in (("cache.dir", str(cache)), ("cache.type", "reflink,hardlink,copy")):
        subprocess.run([*DVC, "config", "--local", option, value], cwd=clone, check=True, capture_output=True)


def _run_cells(
    clones: dict[int, Path],
    known: list[int],
    archives: dict[int, Path],
    workers: int,
    folder: Path,
    done: int,
    total: int,
) -> bool:
    """Run the cells of every seed, some seeds at the same time, under one progress bar; whether all of them succeeded.

    What DVC and the stages print goes to build/<name>/seed<k>.log. The records of a seed that is done go to its file
    among the archives. A seed that fails leaves the others alone; those whose records are known are only counted.
    """
    waiting, running, failed = [seed for seed in clones if seed not in known], {}, []
    environment = {PROCESSES: "1"} | os.environ  # a core for each cell
    share = workers // max(1, len(waiting))  # of the cores, for a seed
    command = [*PARALLEL, "--workers", str(share)] if share > 1 else REPRO
    # drawn anew at every cell: they are few, and minutes lie between them
    with tqdm(total=total, initial=done, miniters=1, desc=folder.name, unit="cell") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    seed = waiting.pop(0)
                    with clones[seed].with_suffix(".log").open("a", encoding="utf-8") as log:
                        running[seed] = subprocess.Popen(
                            [*command, *CELL_STAGES],
                            cwd=clones[seed],
                            env=environment,
                            stdout=log,
                            stderr=log,
                            process_group=0,
                        )
                time.sleep(5)
                bar.update(max(0, _cells(clones.values()) - bar.n))
                ended = {seed: worker.returncode for seed, worker in running.items() if worker.poll() is not None}
                failed += [seed for seed, status in ended.items() if status]
                for seed in (seed for seed, status in ended.items() if not status):
                    pack(clones[seed], archives[seed])
                running = {seed: worker for seed, worker in running.items() if seed not in ended}
        except KeyboardInterrupt:
            for worker in running.values():  # each with all its processes, which the keys do not reach
                os.killpg(worker.pid, signal.SIGINT)
            for worker in running.values():
                worker.wait()
            raise
    for seed in failed:
        print(f"error: seed {seed} failed: see {clones[seed].with_suffix('.log')}", file=sys.stderr)
    return not failed


def _cells(clones: Iterable[Path]) -> int:
    """Number of cells in the dvc.lock of all clones, which DVC may be half through writing."""
    locks = [clone / LOCK for clone in clones]
    return len({name for lock in locks if lock.is_file() for name in ENTRY.findall(lock.read_text(encoding="utf-8"))})


def _joined(clones: Iterable[Path]) -> dict[str, Any]:
    """Stage entries of the dvc.lock of all clones."""
    found = {}
    for clone in clones:
        if (clone / LOCK).is_file():
            found |= yaml.load((clone / LOCK).read_text(encoding="utf-8"), Loader=LOADER)["stages"]
    return found


def _publish(clone: Path, target: Path) -> None:
    """Copy the results of a clone, its params and its lock to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for result in (*(f"reports/{name}" for name in RESULTS), str(PARAMS_FILE)):
        source = clone / result
        if source.is_dir():
            shutil.rmtree(target / source.name, ignore_errors=True)
            shutil.copytree(source, target / source.name)
        else:
            shutil.copy2(source, target / source.name)
    print(f"report: {target / 'report.html'}")


def smoke(changes: Sequence[str]) -> int:
    """Run the smoke preset in a temporary clone."""
    clone = Path(tempfile.mkdtemp(prefix="smoke-")) / "clone"
    copy_with_preset(clone, PRESETS / "smoke.yaml", changes)
    status = subprocess.run(PARALLEL, cwd=clone).returncode
    if status == 0:
        print(f"report: {clone / 'reports' / 'report.html'}")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.pipeline.preset", description="Run a preset.")
    parser.add_argument("preset", choices=preset_names())
    parser.add_argument("--name", help="of the folders in build/ and reports/; the preset's name unless given")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cells at the same time")
    parser.add_argument(
        *("-S", "--set-param"), action="append", default=[], metavar="PARAM=VALUE", help="as of `dvc exp run`"
    )
    parser.add_argument("--recorded", action="store_true", help="take seeds from reports/<name>/records if they fit")
    arguments = parser.parse_args()
    changes = arguments.set_param
    if arguments.preset == "smoke":
        return exit_status(lambda: smoke(changes))
    name = arguments.name or arguments.preset
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what runs in the background without the first
        signal.signal(number, signal.default_int_handler)
    return exit_status(lambda: run_preset(arguments.preset, name, changes, arguments.workers, arguments.recorded))


if __name__ == "__main__":
    raise SystemExit(main())
