"""`make smoke`: the smoke preset in a temporary clone, so that nothing of the working copy is touched."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stages.pipeline.stage import PARAMS_FILE

PRESET = Path("stages/presets/smoke.yaml")


def clone_with_preset(destination: Path, preset: Path = PRESET) -> None:
    """Clone this repository with its uncommitted changes, and make a preset its params.yaml.

    Args:
        destination: folder to create.
        preset: a whole params.yaml with other values.
    """
    source = Path.cwd()
    subprocess.run(["git", "clone", "--quiet", str(source), str(destination)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (source / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, destination / name)
        else:  # deleted in the working copy
            (destination / name).unlink(missing_ok=True)
    shutil.copy2(source / preset, destination / PARAMS_FILE)
    (destination / "dvc.lock").unlink(missing_ok=True)  # it describes another preset


def main() -> int:
    clone = Path(tempfile.mkdtemp(prefix="smoke-")) / "clone"
    clone_with_preset(clone)
    status = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=clone).returncode
    if status == 0:
        print(f"report: {clone / 'reports' / 'report.html'}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
