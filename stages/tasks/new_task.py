"""What a new task is: what a base is fine-tuned on.

A new task `<name>` is one file `stages/tasks/new/<name>.py` with one instance of `NewTask`, called TASK there; the
param `new_task` names it. Params are checked against it, so its file imports nothing heavy at its top. One that asks
something else of a box is a `Relation`, which is two lines. Every old task is a new one as well (`new_tasks.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Split

if TYPE_CHECKING:
    from stages.tasks.examples import Prompts
    from stages.tasks.vocabulary import Vocabulary


class NewTask(ABC):
    """A new task.

    Attributes:
        several_tokens: whether answers are several tokens, with tokenizers that have no token for them.
    """

    several_tokens: ClassVar[bool] = False

    @abstractmethod
    def sign(self, vocabulary: "Vocabulary") -> str:
        """The word that says what is asked for, in a vocabulary.

        Raises:
            Invalid: the tokenizer is not one for this task.
        """

    @abstractmethod
    def draw(self, rng: np.random.Generator, vocabulary: "Vocabulary", split: Split, n: int, boxes: int) -> "Prompts":
        """Prompts, all equally long; for arms that mix both tasks, as long as those of the old one where it can be.

        Args:
            rng: randomness.
            vocabulary: what they are said in.
            split: what they are for; no prompt gives away another split's.
            n: number of prompts.
            boxes: clauses of a prompt, for a task that has them.

        Raises:
            Invalid: the tokenizer is not one for this task.
        """

    @abstractmethod
    def shortcuts(self, prompts: "Prompts", vocabulary: "Vocabulary") -> dict[str, float]:
        """Name of a rule that does not solve the task -> how often it is right on these prompts."""

    @abstractmethod
    def naming(self, boxes: int) -> float:
        """The accuracy of naming any candidate of the prompt; levels must lie above it."""


@dataclass(frozen=True)
class Relation(NewTask):
    """`Box L <verb> the`: the prompts of entity tracking with another verb, answered with objects of other clauses.

    Attributes:
        verbs: words that may stand between the label and the last token, the preferred one first.
        valid: (number of boxes, queried clause) -> clauses whose objects are right, the canonical one first;
            none if that clause is never queried.
    """

    verbs: tuple[str, ...]
    valid: Callable[[int, int], tuple[int, ...]]

    def sign(self, vocabulary: "Vocabulary") -> str:
        """The first of the verbs that is one token.

        Raises:
            Invalid: none is, so that prompts would not be as long as those of the old task.
        """
        for verb in self.verbs:
            if vocabulary.is_one_token(verb):
                return verb
        raise Invalid(f"the tokenizer has no token for any of the verbs {', '.join(self.verbs)}: must have one")

    def draw(self, rng: np.random.Generator, vocabulary: "Vocabulary", split: Split, n: int, boxes: int) -> "Prompts":
        from stages.tasks.relations import draw_prompts

        return draw_prompts(self, rng, vocabulary, split, n, boxes)

    def shortcuts(self, prompts: "Prompts", vocabulary: "Vocabulary") -> dict[str, float]:
        from stages.tasks.shortcuts import shortcut_scores

        return shortcut_scores(prompts, vocabulary)

    def naming(self, boxes: int) -> float:
        return max(len(self.valid(boxes, clause)) for clause in range(boxes)) / boxes
