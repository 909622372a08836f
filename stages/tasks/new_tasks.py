"""The registry of new tasks: those that have a file in `stages/tasks/new/`, and the old tasks."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Split
from stages.tasks.new_task import NewTask, Relation
from stages.tasks.old_task import OldTask
from stages.tasks.old_tasks import old_tasks

if TYPE_CHECKING:
    from stages.tasks.examples import Prompts
    from stages.tasks.vocabulary import Vocabulary

FOLDER = Path(__file__).parent / "new"
_BOXES = 3  # which neither the sign nor the shortcuts of an old task depend on


@dataclass(frozen=True)
class _AsNew(NewTask):
    """An old task as a new one."""

    task: type[OldTask]

    def sign(self, vocabulary: "Vocabulary") -> str:
        return self.task(vocabulary, _BOXES).sign()

    def draw(self, rng: np.random.Generator, vocabulary: "Vocabulary", split: Split, n: int, boxes: int) -> "Prompts":
        return self.task(vocabulary, boxes).prompts(rng, split, n)

    def shortcuts(self, prompts: "Prompts", vocabulary: "Vocabulary") -> dict[str, float]:
        return self.task(vocabulary, _BOXES).shortcuts(prompts)

    def naming(self, boxes: int) -> float:
        return self.task.naming(boxes)


def _found() -> dict[str, NewTask]:
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    found: dict[str, NewTask] = {name: import_module(f"stages.tasks.new.{name}").TASK for name in names}
    return found | {task.same_as: _AsNew(task) for task in old_tasks().values() if task.same_as not in found}


NEW_TASKS = _found()  # name -> task
RELATIONS = {name: task for name, task in NEW_TASKS.items() if isinstance(task, Relation)}


def impossible(vocabulary: "Vocabulary", boxes: int) -> dict[str, str]:
    """The tasks that a tokenizer is not made for, and why.

    Args:
        vocabulary: that of the tokenizer.
        boxes: of the prompts.
    """
    reasons = {}
    for name, task in NEW_TASKS.items():
        try:
            task.draw(np.random.default_rng(0), vocabulary, Split.TRAIN, 1, boxes)
        except Invalid as error:
            reasons[name] = str(error)
    return reasons
