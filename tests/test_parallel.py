"""Several cells at a time: the same pipeline, in which every stage only leaves a trace."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx
import pytest
import yaml
from dvc.repo import Repo
from tqdm import tqdm

from stages.pipeline.overrides import compose
from stages.pipeline.parallel import FIRST, _show, dealt, rounds
from stages.pipeline.params import load_params
from stages.pipeline.records import CELL_STAGES
from stages.pipeline.resources import MEMORY_MIB, PROCESSES
from tests.conftest import REPOSITORY

# writes a file for each path, into it where it is a folder, and appends its first argument to the trace
WORK = """
import sys, time
from pathlib import Path
name, *paths = sys.argv[1:]
time.sleep(0.2)
for path in map(Path, paths):
    file = path if path.suffix else path / "x"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(name)
with open("../trace", "a") as trace:
    trace.write(name + "\\n")
"""


def traced_pipeline() -> dict[str, Any]:
    """The real stages, with their dependencies on each other, and a command that only leaves a trace."""
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    del stages["code"]
    for name, stage in stages.items():
        stage["deps"] = [path for path in stage["deps"] if not path.startswith(("stages/", "data/code/"))]
        outs = [*stage.get("outs", ()), *stage.pop("plots", ()), *stage.pop("metrics", ())]
        stage["outs"] = paths = [path if isinstance(path, str) else next(iter(path)) for path in outs]
        axes = [axis for axis in ("arm", "model", "seed", "learning_rate") if axis in stage.get("matrix", ())]
        cell = "-".join(f"${{item.{axis}}}" for axis in axes)
        stage["cmd"] = " ".join(["python ../work.py", f"{name}@{cell}" if cell else name, *paths])
    asked = {path for stage in stages.values() for path in stage["deps"] if path.startswith("data/")}
    stages["synthesize"]["cmd"] += " " + " ".join(sorted(asked))
    return {"stages": stages}


@pytest.fixture
def traced(tmp_path: Path, dvc_environment: dict[str, str]) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    (tmp_path / "work.py").write_text(WORK)
    compose(REPOSITORY / "params.yaml", root / "params.yaml", REPOSITORY / "stages/presets/smoke.yaml", [])
    (root / "dvc.yaml").write_text(yaml.safe_dump(traced_pipeline(), sort_keys=False))
    (root / "reports/registered").mkdir(parents=True)
    (root / "reports/registered/README.md").write_text("none")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=root, check=True, env=dvc_environment)
    return root


def _run(
    root: Path, environment: dict[str, str], *targets: str, **resources: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The finished process and the cells that it ran on the way to its targets, with these variables set."""
    trace = root.parent / "trace"
    trace.write_text("")
    result = subprocess.run(
        [sys.executable, "-m", "stages.pipeline.parallel", *targets],
        cwd=root,
        env=environment | {"PYTHONPATH": str(REPOSITORY)} | resources,
        capture_output=True,
        text=True,
    )
    return result, trace.read_text().split()


def test_jobs_of_a_round_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    graph = Repo(str(REPOSITORY)).index.graph  # from a cell to what it needs
    needs = {cell.addressing: {other.addressing for other in networkx.descendants(graph, cell)} for cell in graph}
    both = rounds(load_params(REPOSITORY / "params.yaml"))
    done = {cell for cell in needs if cell.startswith(FIRST)}
    done |= set().union(*(needs[cell] for cell in done))
    for jobs in both:
        for job in jobs:
            before = set(done)
            for cell in job:
                assert needs[cell] <= before, f"{cell} also needs {needs[cell] - before}"
                before.add(cell)
        done |= {cell for job in jobs for cell in job}
    assert {cell.partition("@")[0] for cell in needs.keys() - done} == {"contrast", "report"}


def test_cells_are_dealt_out_once_and_jobs_stay_together() -> None:
    jobs = [(f"a{n}", f"b{n}") for n in range(5)]
    shares = dealt(jobs, 2)
    assert shares == [["a0", "b0", "a2", "b2", "a4", "b4"], ["a1", "b1", "a3", "b3"]]
    assert dealt(jobs[:1], 4) == [["a0", "b0"]]


def test_every_cell_runs_once_then_none_then_what_is_stale(traced: Path, dvc_environment: dict[str, str]) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=traced,
        env=dvc_environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    result, ran = _run(traced, dvc_environment, *CELL_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted([*ran, "contrast", "report"]) == sorted(listed), "targets are the end"
    result, ran = _run(traced, dvc_environment)
    assert result.returncode == 0 and ran == ["contrast", "report"]
    lock = yaml.safe_load((traced / "dvc.lock").read_text())["stages"]
    assert sorted(lock) == sorted(listed)

    for resources in ({}, {PROCESSES: "1", MEMORY_MIB: "64"}):
        result, ran = _run(traced, dvc_environment, **resources)
        assert result.returncode == 0 and not ran and "up to date" in result.stdout

    params = yaml.safe_load((traced / "params.yaml").read_text())
    params["finetune"]["common"]["steps"] += 1
    (traced / "params.yaml").write_text(yaml.safe_dump(params))
    result, ran = _run(traced, dvc_environment)
    assert result.returncode == 0, result.stdout + result.stderr
    # the traces that cells leave do not depend on the param, so nothing below them is stale
    # but the statistics, which compare all params with registered ones
    assert sorted(ran) == sorted([*(cell for cell in listed if cell.startswith("finetune@")), "contrast"])

    params["learning_rates"].append(1e-5)
    (traced / "params.yaml").write_text(yaml.safe_dump(params))
    result, ran = _run(traced, dvc_environment)
    assert result.returncode == 0, result.stdout + result.stderr
    further = [f"finetune@{arm}-{seed}-1e-05" for arm in params["arms"] for seed in params["seeds"]]
    again = [cell for cell in listed if cell.startswith("match@")]
    assert sorted(ran) == sorted([*further, *again, "contrast", "report"])


def test_a_failing_cell_ends_the_run_and_is_named(traced: Path, dvc_environment: dict[str, str]) -> None:
    pipeline = yaml.safe_load((traced / "dvc.yaml").read_text())
    pipeline["stages"]["cmap"]["cmd"] = "exit 3"
    (traced / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    result, ran = _run(traced, dvc_environment)
    assert result.returncode != 0
    assert "failed to reproduce 'cmap@" in result.stdout + result.stderr
    assert "report" not in ran


class _Line(tqdm):
    def __init__(self) -> None:
        super().__init__(disable=True)
        self.shown: list[str] = []

    def set_description_str(self, desc: str | None = None, refresh: bool | None = True) -> None:
        self.shown.append(desc or "")


def test_progress_is_shown_while_it_lasts_and_its_end_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    said = b"Running stage 'a':\n\rhop 1\n\r  set 1\x1b[A\rhop 2\n\r  set 2\x1b[A\rhop 3\nUpdating\n\rhalf\rwhole"
    read, write = os.pipe()
    os.write(write, said)
    os.close(write)
    line = _Line()
    with os.fdopen(read, "rb") as stream:
        _show(stream, line)
    assert capsys.readouterr().out.splitlines() == ["Running stage 'a':", "hop 3", "Updating", "whole"]
    assert line.shown == ["hop 1", "set 1", "hop 2", "set 2", "hop 3", "half", "whole"]
