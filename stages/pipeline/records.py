"""What the cells of a seed wrote, in one file that is small enough for git, so that a report can be made from it again.

Such a file holds the dvc.lock of the seed and its reports/cells, not its models: a thousandth of the size. `preset
--recorded` puts it where a run would have put the same, and DVC's `--allow-missing` then takes the cells as done.
"""

import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

from stages.pipeline.command import DVC
from stages.pipeline.files import replacing_file

LOCK, CELLS, BASES = Path("dvc.lock"), Path("reports/cells"), Path("models/base")


def pack(clone: Path, target: Path) -> None:
    """Write the lock and the records of a clone as .tar.xz; equal records give equal bytes."""
    files = [LOCK, *sorted(path.relative_to(clone) for path in (clone / CELLS).rglob("*") if path.is_file())]
    with replacing_file(target) as temporary, tarfile.open(temporary, "w:xz", preset=9) as archive:
        for file in files:
            content = (clone / file).read_bytes()
            entry = tarfile.TarInfo(file.as_posix())  # of nobody, at no time
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))


def unpack(source: Path, clone: Path) -> None:
    """Put the lock and the records of a file of `pack` into a clone, in place of any that are there."""
    shutil.rmtree(clone / CELLS, ignore_errors=True)
    with tarfile.open(source, "r:xz") as archive:
        archive.extractall(clone, filter="data")


def restore(source: Path, clone: Path, targets: tuple[str, ...]) -> bool:
    """Unpack records into a clone that has no models of its own, unless they are of other code or params.

    Args:
        source: file of `pack`; if there is none, nothing is done.
        clone: folder of the clone.
        targets: the stages that are to be done.

    Returns:
        Whether the records are there.
    """
    if not source.is_file() or (clone / BASES).exists():
        return False
    unpack(source, clone)
    # the digests of the code have to be of this code
    subprocess.run([*DVC, "repro", "--quiet", "code"], cwd=clone, check=True)
    command = [*DVC, "repro", "--allow-missing", "--dry", *targets]
    planned = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    # a stage that would run lacks what it reads, which DVC may notice even in a dry run
    if planned.returncode == 0 and "Running stage" not in planned.stdout:
        return True
    print(f"{source}: of other code or params, not used", file=sys.stderr)
    shutil.rmtree(clone / CELLS)
    (clone / LOCK).unlink()
    return False
