"""What the cells of a run wrote, in one file that is small enough for git, so that a report can be made from it again.

    python -m stages.pipeline.records            report and statistics again, from the records of the committed run
    python -m stages.pipeline.records --keep     write these records: those of this working copy

Such a file holds the dvc.lock and reports/cells, not the models: a thousandth of the size. Put where a run would have
put the same, DVC's `--allow-missing` takes the cells as done. `preset --recorded` does so with a file for every seed.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

from stages.pipeline.command import DVC, exit_status
from stages.pipeline.files import replacing_file, write_text
from stages.pipeline.stage import Invalid

LOCK, CELLS, BASES = Path("dvc.lock"), Path("reports/cells"), Path("models/base")
ARCHIVE = Path("reports/records.tar.xz")
FIRST_STAGES = ("code", "source", "synthesize")  # that are no cells of a seed
# what the statistics read; DVC runs what they need, too
CELL_STAGES = ("evaluate_base", "dcm_base", "evaluate", "matchings", "dcm", "cmap", "drift")


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


def restore(source: Path, clone: Path) -> bool:
    """Unpack records into a clone that has no models of its own, unless they are of other code or params.

    Args:
        source: file of `pack`; if there is none, nothing is done.
        clone: folder of the clone.

    Returns:
        Whether the records are there.
    """
    if not source.is_file() or (clone / BASES).exists():
        return False
    unpack(source, clone)
    if _fit(clone):
        return True
    print(f"{source}: of other code or params, not used", file=sys.stderr)
    shutil.rmtree(clone / CELLS)
    (clone / LOCK).unlink()
    return False


def _fit(clone: Path) -> bool:
    """Whether DVC would run no cell of a clone that has records and no models."""
    # the digests of the code have to be of this code
    subprocess.run([*DVC, "repro", "--quiet", "code"], cwd=clone, check=True)
    command = [*DVC, "repro", "--allow-missing", "--dry", *CELL_STAGES]
    planned = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    # a stage that would run lacks what it reads, which DVC may notice even in a dry run
    return planned.returncode == 0 and "Running stage" not in planned.stdout


def report_again(source: Path) -> int:
    """Statistics and report of this working copy from records; returns the exit status.

    Raises:
        Invalid: there are cells here already, or the records are none of this code and these params; nothing has
            changed then.
    """
    if CELLS.exists():
        raise Invalid(f"{CELLS} is there, so the report need not be made from {source}: run dvc repro")
    if not source.is_file():
        raise Invalid(f"there is no {source} here; run from the top of the repository")
    lock = LOCK.read_text(encoding="utf-8")
    unpack(source, Path())
    if not _fit(Path()):
        shutil.rmtree(CELLS)
        write_text(LOCK, lock)
        raise Invalid(f"{source} holds records of other code or params: what they are of must run, with make repro")
    subprocess.run([*DVC, "repro", "--quiet", *FIRST_STAGES], check=True)
    return subprocess.run([*DVC, "repro", "--allow-missing"]).returncode


def _keep(target: Path) -> int:
    if not CELLS.exists():
        raise Invalid(f"there is no {CELLS} to keep: run make repro")
    pack(Path(), target)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.pipeline.records", description="The report from records.")
    parser.add_argument("--keep", action="store_true", help=f"write the records of this working copy to {ARCHIVE}")
    arguments = parser.parse_args()
    return exit_status(lambda: _keep(ARCHIVE) if arguments.keep else report_again(ARCHIVE))


if __name__ == "__main__":
    raise SystemExit(main())
