"""The registry of new tasks: how the prompts of each are drawn, and what it yields to shortcuts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from stages.pipeline.stage import Invalid
from stages.tasks import arithmetic, relations, shortcuts, sums
from stages.tasks.contexts import Split
from stages.tasks.desiderata import LEAST_BOXES
from stages.tasks.examples import Prompts
from stages.tasks.old_task import OldTask
from stages.tasks.old_tasks import old_tasks
from stages.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class NewTask:
    """What a model may be fine-tuned on.

    Attributes:
        sign: the word that says what is asked for, in a vocabulary.
        draw: (randomness, vocabulary, split, number of prompts, boxes) -> prompts, all equally long; those of relations
            and of arithmetic as long as entity tracking with so many boxes. Raises Invalid where the tokenizer is not
            one for this task.
        shortcuts: name of a rule that does not solve the task -> how often it is right on these prompts.
    """

    sign: Callable[[Vocabulary], str]
    draw: Callable[[np.random.Generator, Vocabulary, Split, int, int], Prompts]
    shortcuts: Callable[[Prompts, Vocabulary], dict[str, float]]


ARITHMETIC, SUMS = "arithmetic", "sums"
NEW_TASKS = {
    name: NewTask(relation.verb, partial(relations.draw_prompts, relation), shortcuts.shortcut_scores)
    for name, relation in relations.RELATIONS.items()
} | {
    ARITHMETIC: NewTask(lambda _: "=", arithmetic.draw_prompts, arithmetic.shortcut_scores),
    SUMS: NewTask(lambda _: "=", sums.draw_prompts, sums.shortcut_scores),
}


def _as_new(task: type[OldTask]) -> NewTask:
    return NewTask(
        lambda vocabulary: task(vocabulary, LEAST_BOXES).sign(),
        lambda rng, vocabulary, split, n, boxes: task(vocabulary, boxes).prompts(rng, split, n),
        lambda prompts, vocabulary: task(vocabulary, LEAST_BOXES).shortcuts(prompts),
    )


NEW_TASKS |= {task.same_as: _as_new(task) for task in old_tasks().values() if task.same_as not in NEW_TASKS}


def impossible(vocabulary: Vocabulary, boxes: int) -> dict[str, str]:
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
