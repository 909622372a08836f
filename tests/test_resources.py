"""What cells may take of the machine, as the environment says it, and one sentence where it says nonsense."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.pipeline.resources import MEMORY_MIB, PROCESSES, Resources, resources
from stages.pipeline.stage import Cell, Invalid
from tests.conftest import REPOSITORY

ITEM = {"arm": "grpo", "model": "base", "seed": "0"}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PROCESSES, MEMORY_MIB):
        monkeypatch.delenv(name, raising=False)


def test_the_environment_says_them_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources() == Resources(processes=2, memory_mib=512.0)
    assert resources().share_mib == 256.0
    monkeypatch.setenv(PROCESSES, "8")
    monkeypatch.setenv(MEMORY_MIB, "1.5e3")
    assert resources() == Resources(processes=8, memory_mib=1500.0)
    assert resources().share_mib == 187.5


BAD = [
    *((PROCESSES, value, "must be a whole number, at least 1") for value in ("0", "-1", "1.5", "two", "")),
    *((MEMORY_MIB, value, "must be a number of MiB above 0") for value in ("0", "-1", "nan", "inf", "1 GiB", "")),
]


@pytest.mark.parametrize(("name", "value", "valid"), BAD, ids=[f"{name}={value}" for name, value, _ in BAD])
def test_a_bad_value_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, value: str, valid: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(Invalid) as caught:
        resources()
    assert str(caught.value) == f"{name} = '{value}': {valid}"


@pytest.mark.parametrize("stage", "pretrain finetune discover evaluate matchings dcm cmap drift".split())
def test_a_stage_stops_before_any_work(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, in which any work fails otherwise."""
    module: Any = importlib.import_module(f"stages.{stage}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Cell, "params", lambda cell, path: [])
    monkeypatch.setenv(PROCESSES, "none")
    with pytest.raises(Invalid, match=f"{PROCESSES} = 'none'"):
        module.main(Cell(stage, ITEM))


@pytest.mark.parametrize("command", [["discover", "base", "0"], ["pipeline.parallel"], ["pipeline.preset", "full"]])
def test_a_command_ends_with_status_2(command: list[str], tmp_path: Path) -> None:
    for file in ("params.yaml", "dvc.yaml", "stages/presets/full.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / file, tmp_path / file)
    name, *arguments = command
    result = subprocess.run(
        [sys.executable, "-P", "-m", f"stages.{name}", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), MEMORY_MIB: "much"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == f"error: {MEMORY_MIB} = 'much': must be a number of MiB above 0\n"
