"""New task `sums`: sums of two numbers, for any tokenizer (`stages/tasks/sums.py`)."""

from typing import TYPE_CHECKING

import numpy as np

from stages.tasks.contexts import Split
from stages.tasks.new_task import NewTask

if TYPE_CHECKING:
    from stages.tasks.examples import Prompts
    from stages.tasks.vocabulary import Vocabulary


class Sums(NewTask):
    """See `NewTask`."""

    several_tokens = True

    def sign(self, vocabulary: "Vocabulary") -> str:
        return "="

    def draw(self, rng: np.random.Generator, vocabulary: "Vocabulary", split: Split, n: int, boxes: int) -> "Prompts":
        from stages.tasks.sums import draw_prompts

        return draw_prompts(rng, vocabulary, split, n, boxes)

    def shortcuts(self, prompts: "Prompts", vocabulary: "Vocabulary") -> dict[str, float]:
        from stages.tasks.sums import shortcut_scores

        return shortcut_scores(prompts, vocabulary)

    def naming(self, boxes: int) -> float:
        return 0.0  # no prompt has its answer


TASK = Sums()
