"""What cells may take of the machine, as the environment says it, and one sentence where it says nonsense."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stages.pipeline.resources import (
    DEVICE,
    DTYPE,
    MEMORY_MIB,
    PROCESSES,
    VISIBLE,
    Resources,
    claim_device,
    resources,
)
from stages.pipeline.stage import Cell, Invalid
from tests.conftest import REPOSITORY

ITEM = {"arm": "grpo", "model": "base", "seed": "0", "learning_rate": "0.001"}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PROCESSES, MEMORY_MIB, DEVICE, DTYPE):
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


def test_a_gpu_is_one_process_with_more_memory_and_records_say_what_is_not_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert resources().stated() == {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv(DEVICE, "cuda:1")
    assert resources() == Resources(1, 4096.0, "cuda:1")
    monkeypatch.setenv(DTYPE, "bfloat16")
    assert resources().stated() == {"device": "cuda", "dtype": "bfloat16"}
    monkeypatch.setenv(PROCESSES, "2")
    with pytest.raises(Invalid, match=f"{PROCESSES} = '2': must be 1 with {DEVICE} = 'cuda:1'"):
        resources()


@pytest.mark.parametrize(
    ("name", "value", "found", "sentence"),
    [
        (DTYPE, "float16", 0, "must be one of float32, bfloat16, float64"),
        (DEVICE, "gpu", 0, "must be cpu, cuda or cuda:N"),
        (DEVICE, "cuda", 0, f"torch {torch.__version__} sees no CUDA devices: must be cpu"),
        (DEVICE, "cuda:1", 1, f"torch {torch.__version__} sees 1 CUDA device: must be cpu or cuda or cuda:0"),
    ],
)
def test_a_device_or_precision_that_there_is_not_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, found: int, sentence: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setenv(name, value)
    for check in (resources, *([claim_device] if name == DEVICE else [])):
        with pytest.raises(Invalid) as caught:
            check()
        assert str(caught.value) == f"{name} = '{value}': {sentence}"


@pytest.mark.parametrize(("visible", "left"), [(None, "1"), ("4, 7", "7")])
def test_a_process_claims_the_one_gpu_that_it_is_told(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, left: str
) -> None:
    """So that trainers, which take the first GPU or all, see no other."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "environ", {DEVICE: "cuda:1"} | ({} if visible is None else {VISIBLE: visible}))
    claim_device()
    assert os.environ[VISIBLE] == left and os.environ[DEVICE] == "cuda"
    claim_device()  # in a process that the first one started
    assert os.environ[VISIBLE] == left


def test_resources_are_no_params_and_no_dependencies() -> None:
    """So a change makes nothing stale."""
    pipeline, params = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("dvc.yaml", "params.yaml"))
    keys = yaml.safe_load(params)
    for name in (PROCESSES, MEMORY_MIB, DEVICE, DTYPE):
        assert name not in pipeline and name not in params
    words = {"device", "dtype", "processes", "memory_mib"}
    assert not words & {str(key) for section in keys.values() if isinstance(section, dict) for key in section}
    stages = yaml.safe_load(pipeline)["stages"].values()
    declared = {path.rpartition(".")[2] for stage in stages for path in map(str, stage.get("params", []))}
    assert not words & declared


@pytest.mark.parametrize("stage", "pretrain finetune match discover evaluate matchings dcm cmap drift".split())
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
