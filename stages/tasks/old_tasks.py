"""The registry of old tasks: those that have a file in `stages/tasks/old/`."""

from functools import cache
from importlib import import_module
from pathlib import Path

from stages.tasks.old_task import OldTask

FOLDER = Path(__file__).parent / "old"


@cache
def old_tasks() -> dict[str, type[OldTask]]:
    """Name -> task, in alphabetic order."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    return {name: import_module(f"stages.tasks.old.{name}").TASK for name in names}
