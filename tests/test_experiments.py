"""`dvc exp run` as people use it: from a linked worktree of git, with a small number given on the command line."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from stages.pipeline.params import load_params, parse_yaml
from stages.pipeline.preset import PRESETS, copy_with_preset
from stages.pipeline.stage import Invalid
from tests.conftest import REPOSITORY, Dvc


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "2.5e-4", "-3e2", "+3e2", ".5e1", "5.e1", "1e+2"])
def test_numbers_with_an_exponent_are_numbers(text: str) -> None:
    value = parse_yaml(f"x: {text}")["x"]
    assert type(value) is float and value == float(text)
    assert parse_yaml(text) == value


@pytest.mark.parametrize("text", ["'1e-5'", "1e", "e5", "1e-5x", "1 e5", "learning", "0x1e", "v1e5"])
def test_other_words_stay_what_they_are(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("finetune.dr_grpo_kl.beta=1e-5", 1e-5),
        ("match.kl=[2e-2,3e-1]", (0.02, 0.3)),
        ("drift.relearning.betas=[9e-1,0.999]", (0.9, 0.999)),
        ("pretrain.curriculum.final.templates.standard=3e-1", 0.3),
    ],
)
def test_dvc_writes_what_the_params_read(override: str, found: object, tmp_path: Path) -> None:
    """Through DVC's own way of writing an override into the file."""
    file = shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    apply_overrides(file, [override])
    value = load_params(file)
    for key in override.partition("=")[0].split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    assert value == found


def test_a_count_does_not_become_a_fraction(tmp_path: Path) -> None:
    file = shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    apply_overrides(file, ["finetune.common.steps=1e-5"])
    with pytest.raises(Invalid, match="finetune.common.steps = 1e-05: must be valid integer"):
        load_params(file)


def test_an_experiment_runs_in_a_linked_worktree(tmp_path: Path, dvc: Dvc, monkeypatch: pytest.MonkeyPatch) -> None:
    clone, linked = tmp_path / "clone", tmp_path / "linked"
    monkeypatch.chdir(REPOSITORY)
    copy_with_preset(clone, PRESETS / "smoke.yaml", [])
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (
        ["add", "-A"],
        [*identity, "commit", "-q", "--allow-empty", "-m", "t"],
        ["worktree", "add", "-q", str(linked), "-b", "linked"],
    ):
        subprocess.run(["git", *command], cwd=clone, check=True, capture_output=True)
    assert (linked / ".git").is_file()  # so it is one
    done = dvc(linked, "exp", "run", "-S", "finetune.dr_grpo_kl.beta=1e-5", "synthesize")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert load_params(linked / "params.yaml").finetune.of("dr_grpo_kl").beta == 1e-5
    assert (linked / "data/old/evaluation.parquet").exists() and not (clone / "data/old").exists()
    shown = json.loads(dvc(linked, "exp", "show", "--json", "--hide-queued").stdout)
    experiments = [entry for revision in shown for entry in revision.get("experiments") or []]
    assert len(experiments) == 1
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    refs = subprocess.run(
        ["git", "for-each-ref", "refs/exps"], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert "refs/exps" in refs.stdout
