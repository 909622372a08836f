"""Running a preset beside the working copy: a clone for every seed, resumable, and priced beforehand."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.pipeline.overrides import compose
from stages.pipeline.preset import _cells
from stages.pipeline.records import CELL_STAGES
from tests.conftest import REPOSITORY

PRESET = "stages/presets/toy.yaml"
# stages with the names and axes of the real ones, and trivial work that leaves a trace of every run
CELL = "mkdir -p reports/cells/{0} && echo {0} ${{item.seed}} | tee -a ../trace > reports/cells/{0}/${{item.seed}}.json"
RESULTS = "report.html report.md summary.json statistics.json cells.csv"
COLLECT = (
    f"cat reports/cells/*/*.json > reports/all; mkdir -p reports/figures; cd reports; tee {RESULTS} figures/a < all"
)


def toy_pipeline() -> dict[str, Any]:
    first: dict[str, Any] = {
        name: {"cmd": f"mkdir -p data && cp input data/{name}", "deps": ["input"], "outs": [f"data/{name}"]}
        for name in ("code", "source", "synthesize")
    }
    first["pretrain"] = {
        "matrix": {"seed": "${seeds}"},
        "cmd": "mkdir -p models/base models/matched/${item.seed} && echo ${item.seed} | tee models/base/${item.seed} "
        "> models/matched/${item.seed}/own && echo x > models/matched/${item.seed}/equal",
        "deps": ["data/code", "data/source", "data/synthesize"],
        "outs": ["models/base/${item.seed}"] + [f"models/matched/${{item.seed}}/{arm}" for arm in ("own", "equal")],
    }
    stages: dict[str, Any] = first | {
        name: {
            "matrix": {"seed": "${seeds}"},
            "cmd": CELL.format(name),
            "deps": ["models/base/${item.seed}", "models/matched/${item.seed}"],
            "outs": [f"reports/cells/{name}/${{item.seed}}.json"],
        }
        for name in CELL_STAGES
    }
    outs = [{f"reports/{name}": {"cache": False}} for name in [*RESULTS.split(), "figures"]]
    stages["report"] = {"cmd": COLLECT, "deps": ["reports/cells"], "params": ["seeds"], "outs": outs}
    return {"stages": stages}


@pytest.fixture
def working_copy(tmp_path: Path) -> Path:
    """A repository with the toy pipeline and the params of the smoke preset, for three seeds."""
    root = tmp_path / "repository"
    (root / "stages/presets").mkdir(parents=True)
    (root / PRESET).write_text("seeds: [0, 1, 2]\n")
    smoke = REPOSITORY / "stages/presets/smoke.yaml"
    compose(REPOSITORY / "params.yaml", root / "params.yaml", smoke, ["seeds=[5]"])
    (root / "dvc.yaml").write_text(yaml.safe_dump(toy_pipeline()))
    (root / ".gitignore").write_text("/build/\n/reports/cells/\n/trace\n/models/\n/data/\n")
    (root / "input").write_text("x")
    (root / "reports").mkdir()
    (root / "reports/README.md").write_text("x")
    for command in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        ["git", "add", "-A"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"],
    ):
        subprocess.run(command, cwd=root, check=True, env=_environment(root))
    return root


def _environment(root: Path) -> dict[str, str]:
    site = str(root.parent / "site")
    return os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": site, "PYTHONPATH": str(REPOSITORY)}


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.pipeline.preset", "toy", "--workers", "2", *arguments]
    return subprocess.run(command, cwd=root, env=_environment(root), capture_output=True, text=True)


def test_every_cell_runs_once_and_the_report_has_all(working_copy: Path) -> None:
    result = _run(working_copy)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 of" in result.stdout and "hours" in result.stdout, "the cost is said"
    report = (working_copy / "reports/toy/summary.json").read_text().split("\n")
    cells = sorted(f"{name} {seed}" for name in CELL_STAGES for seed in (0, 1, 2))
    assert sorted(filter(None, report)) == cells
    assert not (working_copy / "dvc.lock").exists() and yaml.safe_load((working_copy / "params.yaml").read_text())[
        "seeds"
    ] == [5], "the working copy is as it was"
    # stopped halfway: one seed has lost two of its cells, with their results
    clone = working_copy / "build/toy/seed2"
    lock = yaml.safe_load((clone / "dvc.lock").read_text())
    for name in ("cmap@2", "drift@2"):
        del lock["stages"][name]
    (clone / "dvc.lock").write_text(yaml.safe_dump(lock))
    traced = (working_copy / "build/toy/trace").read_text() if (working_copy / "build/toy/trace").exists() else None
    again = _run(working_copy)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{3 + 3 + 3 * len(CELL_STAGES) - 2} of" in again.stdout
    if traced is not None:
        assert (working_copy / "build/toy/trace").read_text() == traced, "restored from the cache, not run again"


def test_cells_are_counted_while_a_lock_is_being_written(tmp_path: Path) -> None:
    entries = {f"evaluate@{seed}": {"cmd": "true", "outs": [{"path": "a", "md5": "0"}]} for seed in range(3)}
    whole = yaml.safe_dump({"schema": "2.0", "stages": {"code": {"cmd": "true"}} | entries})
    for name, text in (("whole", whole), ("half", whole[: whole.index("evaluate@2") + 4]), ("empty", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dvc.lock").write_text(text)
    assert _cells([tmp_path / "whole", tmp_path / "none"]) == 4
    assert _cells([tmp_path / "half"]) == 3
    assert _cells([tmp_path / "empty", tmp_path / "half"]) == 3


def _traced(root: Path) -> list[str]:
    trace = root / "build/toy/trace"
    return trace.read_text().split("\n")[:-1] if trace.exists() else []


def test_records_stand_in_for_cells_until_what_made_them_changes(working_copy: Path) -> None:
    def forget_all_but_records() -> dict[str, bytes]:
        for folder in ("build", ".dvc/cache"):
            shutil.rmtree(working_copy / folder)
        files = (path for path in (working_copy / "reports/toy").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    two = ("-S", "seeds=[0,1]")
    assert _run(working_copy, *two).returncode == 0
    assert len(_traced(working_copy)) == 2 * len(CELL_STAGES)
    before = forget_all_but_records()
    again = _run(working_copy, "--recorded", *two)
    assert again.returncode == 0 and "from records: [0, 1]" in again.stdout, again.stdout + again.stderr
    assert _traced(working_copy) == [] and f"{3 + 2 + 2 * len(CELL_STAGES)} of" in again.stdout
    assert forget_all_but_records() == before, "report and records are the same bytes"
    # one more seed, on a machine that has nothing but the records; the second time there is nothing to do
    for _ in range(2):
        more = _run(working_copy, "--recorded")
        assert more.returncode == 0, more.stdout + more.stderr
        assert sorted(_traced(working_copy)) == sorted(f"{name} 2" for name in CELL_STAGES)
    report = (working_copy / "reports/toy/summary.json").read_text()
    assert all(f"{name} {seed}\n" in report for name in CELL_STAGES for seed in range(3))
    # other input: the records do not fit it
    forget_all_but_records()
    (working_copy / "input").write_text("y")
    other = _run(working_copy, "--recorded", "-S", "seeds=[1]")
    assert other.returncode == 0, other.stdout + other.stderr
    assert "seed1.tar.xz: of other code or params, not used" in other.stderr
    assert len(_traced(working_copy)) == len(CELL_STAGES)


def test_the_report_again_from_the_records_of_the_working_copy(working_copy: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-m", *command)
        return subprocess.run(command, cwd=working_copy, env=_environment(working_copy), capture_output=True, text=True)

    trace, summary = working_copy.parent / "trace", working_copy / "reports/summary.json"
    assert run("stages.pipeline.records", "--keep").returncode == 2, "nothing has run"
    assert run("dvc", "repro").returncode == 0
    assert run("stages.pipeline.records", "--keep").returncode == 0
    refused = run("stages.pipeline.records")
    assert refused.returncode == 2 and "reports/cells is there" in refused.stderr
    before, lock = summary.read_text(), (working_copy / "dvc.lock").read_text()
    assert len(trace.read_text().split()) == 2 * len(CELL_STAGES) and before

    # as in a fresh clone, and with a report whose code or params have changed
    for folder in ("models", "data", "reports/cells", ".dvc/cache"):
        shutil.rmtree(working_copy / folder)
    trace.unlink()
    summary.write_text("")
    again = run("stages.pipeline.records")
    assert again.returncode == 0, again.stdout + again.stderr
    assert summary.read_text() == before and not trace.exists()
    assert (working_copy / "dvc.lock").read_text() == lock

    # other input: the records do not fit it, and nothing is lost
    shutil.rmtree(working_copy / "reports/cells")
    (working_copy / "input").write_text("y")
    other = run("stages.pipeline.records")
    assert other.returncode == 2 and "other code or params" in other.stderr
    assert (working_copy / "dvc.lock").read_text() == lock and summary.read_text() == before and not trace.exists()


def test_a_failing_cell_is_named_and_nothing_is_published(working_copy: Path) -> None:
    pipeline = toy_pipeline()
    pipeline["stages"]["cmap"]["cmd"] = "echo $STAGES_PROCESSES process for each seed && exit 3"
    (working_copy / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    result = _run(working_copy)
    assert result.returncode == 1
    log = (working_copy / "build/toy/seed0.log").read_text()
    assert "seed0.log" in result.stderr and "cmap" in log and "\n1 process for each seed\n" in log
    assert not (working_copy / "reports/toy").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_background_it_leaves_nothing_running(working_copy: Path, number: signal.Signals) -> None:
    pipeline = toy_pipeline()
    pipeline["stages"]["pretrain"]["cmd"] = "echo $$ >> ../running && exec sleep 600"
    (working_copy / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    command = [sys.executable, "-m", "stages.pipeline.preset", "toy", "--workers", "2"]
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in the background
    preset = subprocess.Popen(command, cwd=working_copy, env=_environment(working_copy), stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, ignored)
    running = working_copy / "build/toy/running"
    deadline = time.monotonic() + 120
    while not running.exists() or len(running.read_text().split()) < 2:
        assert preset.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    preset.send_signal(number)
    assert preset.wait(timeout=60) == 130
    cells = [int(process) for process in running.read_text().split()]
    assert len(cells) == 2, "no other seed has been started"
    assert not [process for process in cells if Path(f"/proc/{process}").exists()]
