"""The registry of new tasks: how the prompts of each are drawn, and what it yields to shortcuts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from stages.pipeline.stage import Invalid
from stages.tasks import arithmetic, relations, shortcuts
from stages.tasks.contexts import Split
from stages.tasks.examples import Prompts
from stages.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class NewTask:
    """What a model may be fine-tuned on.

    Attributes:
        sign: the word that says what is asked for, in a vocabulary.
        draw: (randomness, vocabulary, split, number of prompts, boxes) -> prompts, as long as those of entity
            tracking with so many boxes. Raises Invalid where the tokenizer is not one for this task.
        shortcuts: name of a rule that does not solve the task -> how often it is right on these prompts.
    """

    sign: Callable[[Vocabulary], str]
    draw: Callable[[np.random.Generator, Vocabulary, Split, int, int], Prompts]
    shortcuts: Callable[[Prompts, Vocabulary], dict[str, float]]


ARITHMETIC = "arithmetic"
NEW_TASKS = {
    name: NewTask(relation.verb, partial(relations.draw_prompts, relation), shortcuts.shortcut_scores)
    for name, relation in relations.RELATIONS.items()
} | {ARITHMETIC: NewTask(lambda _: "=", arithmetic.draw_prompts, arithmetic.shortcut_scores)}


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
