"""What one more value of an axis makes stale: read from the cells that DVC makes of dvc.yaml and params.yaml."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo

from stages.pipeline.overrides import compose
from stages.pipeline.params import load_params
from tests.conftest import REPOSITORY

COLLECTED = {"contrast", "report"}  # from the cells of all axes
LISTED = {"code"}  # reads the list of arms, and writes a file for each


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, dvc_environment: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("repository")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=root, check=True, env=dvc_environment)
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    return root


def _cells(root: Path, *changes: str) -> dict[str, Any]:
    """By name of a cell all that DVC compares: command, paths, and the values of its params."""
    compose(REPOSITORY / "params.yaml", root / "params.yaml", None, changes)
    load_params(root / "params.yaml")
    with Repo(str(root)) as repo:
        return {
            stage.addressing.rpartition(":")[2]: (
                stage.cmd,
                {str(dep) for dep in stage.deps if not isinstance(dep, ParamsDependency)},
                {str(out) for out in stage.outs},
                [dep.read_params() for dep in stage.deps if isinstance(dep, ParamsDependency)],
            )
            for stage in repo.index.stages
        }


@pytest.mark.parametrize(
    ("change", "only"),
    [
        ("arms=[sft_gold,self_sft,reinforce,dr_grpo,sft_replay,noise,rloo]", "rloo-"),
        ("seeds=[0,1,2,3]", "3"),
    ],
)
def test_one_more_arm_or_seed_leaves_all_other_cells_as_they_are(empty: Path, change: str, only: str) -> None:
    before, after = _cells(empty), _cells(empty, change)
    assert before.keys() < after.keys()
    assert {name for name in before if before[name] != after[name]} - LISTED == COLLECTED
    more = after.keys() - before.keys()
    assert more and all(only in name for name in more)


def test_fewer_arms_need_no_other_change(empty: Path) -> None:
    before, after = _cells(empty), _cells(empty, "arms=[sft_gold,dr_grpo]")
    assert after.keys() < before.keys()
    assert {name for name in after if before[name] != after[name]} - LISTED == COLLECTED
