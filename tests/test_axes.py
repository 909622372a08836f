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


ANOTHER_RATE = "learning_rates=[0.0003,1e-5]"


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
    return _read(root)


def _read(root: Path) -> dict[str, Any]:
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
    ("change", "only", "collected"),
    [
        ("arms=[sft_gold,self_sft,dr_grpo,sft_replay,noise,rloo]", "rloo-", COLLECTED),
        ("seeds=[0,1,2,3]", "3", COLLECTED),
        (ANOTHER_RATE, "-1e-05", COLLECTED | {"match"}),
    ],
)
def test_one_more_value_of_an_axis_leaves_all_other_cells_as_they_are(
    empty: Path, change: str, only: str, collected: set[str]
) -> None:
    before, after = _cells(empty), _cells(empty, change)
    assert before.keys() < after.keys()
    changed = {name.partition("@")[0] for name in before if before[name] != after[name]}
    assert changed - LISTED == collected
    more = after.keys() - before.keys()
    assert more and all(only in name for name in more)


def test_fewer_arms_need_no_other_change(empty: Path) -> None:
    before, after = _cells(empty), _cells(empty, "arms=[sft_gold,dr_grpo]")
    assert after.keys() < before.keys()
    assert {name for name in after if before[name] != after[name]} - LISTED == COLLECTED


def test_one_more_rate_is_read_by_match_alone(empty: Path) -> None:
    """It writes the model that it wrote, whose cells do not run again, and further ones for `matchings`."""
    before, after = _cells(empty), _cells(empty, ANOTHER_RATE)
    more = after.keys() - before.keys()
    assert {name.partition("@")[0] for name in more} == {"finetune"}

    def readers(of: str) -> set[str]:
        written = [out for name in more for out in after[name][2] if of in out]
        assert len(written) == len(more)
        read = {name: deps for name, (_, deps, _, _) in after.items()}
        return {n.partition("@")[0] for n in read for d in read[n] for out in written if f"{out}/".startswith(f"{d}/")}

    assert readers("models/runs/") == {"match"}
    assert readers("reports/cells/finetune/") == {"match"} | COLLECTED


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("1e-5", "1e-05"),
        ("1.0e-5", "1e-05"),
        ("0.00001", "1e-05"),
        ("3e-4", "0.0003"),
        ("3E-04", "0.0003"),
        ("1.0e-3", "0.001"),
        ("1e-3", "0.001"),
    ],
)
def test_dvc_names_a_rate_as_the_stages_do(empty: Path, written: str, name: str) -> None:
    """Whether it came by -S or was written into the file."""
    changed = _cells(empty, f"learning_rates=[{written}]", f"match.learning_rate={written}")
    text = (REPOSITORY / "params.yaml").read_text()
    for key in ("learning_rates: [", "  learning_rate: "):
        assert text.count(f"\n{key}3.0e-4") == 1
        text = text.replace(f"\n{key}3.0e-4", f"\n{key}{written}")
    (empty / "params.yaml").write_text(text)
    assert str(load_params(empty / "params.yaml").learning_rates[0]) == name
    for cells in (changed, _read(empty)):
        command, _, outs, _ = cells[f"finetune@dr_grpo-0-{name}"]
        assert command == f"python -m stages finetune dr_grpo 0 {name}"
        [run] = [out for out in outs if out.endswith(f"models/runs/dr_grpo/0/{name}")]
        assert any(out.endswith(f"reports/cells/finetune/dr_grpo/0/{name}.csv") for out in outs)
        folder = run.rpartition("/")[0]
        assert folder in cells["match@dr_grpo-0"][1]
        assert folder.replace("dr_grpo", "sft_gold") in cells["match@noise-0"][1]
