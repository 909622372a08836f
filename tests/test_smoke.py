"""The real pipeline, run once in a clone with the smoke preset, and what DVC then calls stale."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from stages.pipeline.resources import MEMORY_MIB, PROCESSES
from tests.conftest import Dvc


def _stale(dvc: Dvc, clone: Path) -> set[str]:
    result = dvc(clone, "status", "--json")
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


@contextmanager
def _edited(path: Path, text: str) -> Iterator[None]:
    before = path.read_bytes()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextmanager
def _param(clone: Path, path: str, value: object) -> Iterator[None]:
    params = yaml.safe_load((clone / "params.yaml").read_text())
    *parents, last = path.split(".")
    section = params
    for key in parents:
        section = section[key]
    assert section[last] != value
    section[last] = value
    with _edited(clone / "params.yaml", yaml.safe_dump(params)):
        yield


def test_a_second_run_does_nothing(smoke_run: Path, dvc: Dvc) -> None:
    result = dvc(smoke_run, "repro")
    assert result.returncode == 0
    assert "Running stage" not in result.stdout
    assert _stale(dvc, smoke_run) == set()


def test_other_resources_make_nothing_stale(smoke_run: Path, dvc_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "dvc", "repro", "--dry"]
    environment = dvc_environment | {PROCESSES: "1", MEMORY_MIB: "64"}
    result = subprocess.run(command, cwd=smoke_run, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "Running stage" not in result.stdout, result.stdout + result.stderr


def test_only_the_report_and_the_lock_show_up_in_git(smoke_run: Path) -> None:
    status = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"],
        cwd=smoke_run,
        capture_output=True,
        text=True,
    ).stdout
    changed = {line[3:] for line in status.splitlines()}
    expected = ("dvc.lock", "reports/report.html", "reports/report.md", "reports/summary.json")
    expected += ("reports/statistics.json", "reports/cells.csv", "reports/figures/")
    assert all(name.startswith(expected) for name in changed), changed


def test_lock_lists_exactly_the_cells(smoke_run: Path, dvc: Dvc) -> None:
    locked = set(yaml.safe_load((smoke_run / "dvc.lock").read_text())["stages"])
    assert locked == set(dvc(smoke_run, "stage", "list", "--name-only").stdout.split())


def _cells(clone: Path) -> dict[str, list[str]]:
    params = yaml.safe_load((clone / "params.yaml").read_text())
    return {"seeds": [str(s) for s in params["seeds"]], "arms": params["arms"]}


def test_a_param_of_one_arm_makes_only_its_cells_stale(smoke_run: Path, dvc: Dvc) -> None:
    params = yaml.safe_load((smoke_run / "params.yaml").read_text())
    key, value = next((k, v) for k, v in params["finetune"]["dr_grpo"].items() if not isinstance(v, bool | str))
    with _param(smoke_run, f"finetune.dr_grpo.{key}", value + 1):
        direct = _stale(dvc, smoke_run)
        result = dvc(smoke_run, "repro", "--dry")
    seeds = _cells(smoke_run)["seeds"]
    cells = {f"finetune@dr_grpo-{seed}-{rate}" for seed in seeds for rate in params["learning_rates"]}
    assert direct == cells | {"contrast"}  # which compares all params with registered ones
    # --dry follows the change: a stage that would run is announced, and so is what reads its outputs
    assert not [line for line in result.stdout.splitlines() if "Running stage" in line and "sft" in line]


def test_one_more_learning_rate_trains_its_own_cells_alone(smoke_run: Path, dvc: Dvc, tmp_path: Path) -> None:
    """In a copy. `match` runs again and writes the models that it wrote, so that what is below them is not stale; what
    it picked at the new rate `matchings` looks at."""
    clone = tmp_path / "clone"
    shutil.copytree(smoke_run, clone, symlinks=True)
    params = yaml.safe_load((clone / "params.yaml").read_text())
    params["learning_rates"].append(1e-5)
    (clone / "params.yaml").write_text(yaml.safe_dump(params))
    result = dvc(clone, "repro", "match")
    assert result.returncode == 0, result.stderr
    cells = [f"{arm}-{seed}" for arm in params["arms"] for seed in params["seeds"]]
    ran = re.findall(r"Running stage '(.*)'", result.stdout)
    assert sorted(ran) == sorted([*(f"finetune@{cell}-1e-05" for cell in cells), *(f"match@{cell}" for cell in cells)])
    assert _stale(dvc, clone) == {f"matchings@{cell}" for cell in cells} | {"contrast", "report"}


def test_report_params_make_only_the_report_stale(smoke_run: Path, dvc: Dvc) -> None:
    params = yaml.safe_load((smoke_run / "params.yaml").read_text())
    key, value = next((k, v) for k, v in params["report"].items() if isinstance(v, int) and not isinstance(v, bool))
    with _param(smoke_run, f"report.{key}", value + 1):
        assert _stale(dvc, smoke_run) == {"report"}


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("stages/report.py", {"report"}),
        ("stages/contrast.py", {"contrast"}),
        ("stages/dcm.py", {"dcm"}),
        ("stages/discover.py", {"discover"}),
        ("stages/match.py", {"match"}),
        ("stages/circuits/transplant.py", {"cmap"}),
        ("stages/learning/arms/dr_grpo.py", {"finetune@dr_grpo"}),
        ("stages/learning/curriculum.py", {"pretrain"}),
    ],
)
def test_editing_code_makes_its_stage_stale(smoke_run: Path, dvc: Dvc, module: str, stages: set[str]) -> None:
    lock, digests = smoke_run / "dvc.lock", smoke_run / "data/code"
    before = lock.read_bytes()
    with _edited(smoke_run / module, (smoke_run / module).read_text() + "\n# edited\n"):
        assert _stale(dvc, smoke_run) == {"code"}
        assert dvc(smoke_run, "repro", "code").returncode == 0
        stale = _stale(dvc, smoke_run)
    lock.write_bytes(before)
    assert dvc(smoke_run, "checkout", str(digests)).returncode == 0
    assert _stale(dvc, smoke_run) == set()
    assert stale
    assert all(
        any(name == stage or name.startswith((f"{stage}@", f"{stage}-", f"{stage}_base@")) for stage in stages)
        for name in stale
    ), stale


def test_reverting_a_param_restores_from_the_run_cache(smoke_run: Path, dvc: Dvc) -> None:
    """A cell that is forced out of the lock comes back from the run cache, without its command."""
    seed = _cells(smoke_run)["seeds"][0]
    lock = smoke_run / "dvc.lock"
    entries = yaml.safe_load(lock.read_text())
    del entries["stages"][f"cmap@dr_grpo-{seed}"]
    with _edited(lock, yaml.safe_dump(entries)):
        result = dvc(smoke_run, "repro", "--single-item", f"cmap@dr_grpo-{seed}")
        assert result.returncode == 0
        assert "is cached - skipping run" in result.stdout


def test_no_unfinished_file_is_left(smoke_run: Path) -> None:
    assert not list(smoke_run.rglob("*.partial"))


def test_weights_are_safetensors_only(smoke_run: Path) -> None:
    suffixes = {
        path.suffix for path in (smoke_run / "models").rglob("*") if path.is_file() and path.name != "README.md"
    }
    assert suffixes <= {".safetensors", ".json", ".jinja", ".csv"}, suffixes


def test_a_shrunk_matrix_is_not_reported_from_leftovers(smoke_run: Path, dvc: Dvc) -> None:
    """Dropping an arm makes contrast and report stale, although the dropped cells' files are still there."""
    cells = _cells(smoke_run)
    params = yaml.safe_load((smoke_run / "params.yaml").read_text())
    dropped = [arm for arm in cells["arms"] if arm != params["match"]["like"]][-1]
    params["arms"] = [arm for arm in cells["arms"] if arm != dropped]
    with _edited(smoke_run / "params.yaml", yaml.safe_dump(params)):
        assert {"contrast", "report"} <= _stale(dvc, smoke_run)
