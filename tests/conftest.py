"""Shared fixtures: one thread, a real language model, one smoke run of the real pipeline that several tests look at."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Also after a test of a stage that takes two: a process that is forked then may wait for ever."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1) as a folder; made once for all runs of the tests, whichever process asks first."""
    from stages.pipeline.packaged_model import FOLDER, packaged_model
    from stages.pipeline.stage import Invalid

    try:
        return packaged_model(REPOSITORY / FOLDER)
    except Invalid as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def dvc_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which DVC and git see no settings and no state of this machine."""
    home = tmp_path_factory.mktemp("dvc")
    return os.environ | {
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(home / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(home / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(home / "system"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


Dvc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def dvc(dvc_environment: dict[str, str]) -> Dvc:
    """Run dvc in a folder: dvc(folder, "repro")."""

    def call(folder: Path, *arguments: str, timeout: int = 1200) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=folder,
            env=dvc_environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, dvc: Dvc) -> Path:
    """A clone of the working copy in which the whole pipeline ran once with the smoke preset."""
    from stages.pipeline.preset import PRESETS, copy_with_preset

    clone = tmp_path_factory.mktemp("smoke") / "clone"
    before = Path.cwd()
    os.chdir(REPOSITORY)
    try:
        copy_with_preset(clone, PRESETS / "smoke.yaml", [])
    finally:
        os.chdir(before)
    # commit what the clone adds to the last commit, so that `git status` shows only what the run wrote
    for command in (
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "t"],
    ):
        subprocess.run(["git", *command], cwd=clone, check=True, capture_output=True)
    result = dvc(clone, "repro")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return clone
