"""New task `repeats`: the object that is in two boxes, 1 right answer; no box is asked for.

To answer is to copy what the context says twice, which the circuit of IOI is known to avoid.
"""

from typing import TYPE_CHECKING

import numpy as np

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Split
from stages.tasks.new_task import NewTask

if TYPE_CHECKING:
    from stages.tasks.examples import Prompts
    from stages.tasks.vocabulary import Vocabulary

QUESTION = ("Two", "boxes", "contain", "the")  # as many words as ask for a box


class Repeats(NewTask):
    """See `NewTask`."""

    def sign(self, vocabulary: "Vocabulary") -> str:
        for word in QUESTION:
            if not vocabulary.is_one_token(word):
                raise Invalid(f"the tokenizer has no token for '{word}': must have one")
        return QUESTION[0]

    def draw(self, rng: np.random.Generator, vocabulary: "Vocabulary", split: Split, n: int, boxes: int) -> "Prompts":
        from stages.tasks.contexts import Contexts, draw_contexts
        from stages.tasks.examples import Prompts
        from stages.tasks.templates import STANDARD, context_pattern, render

        self.sign(vocabulary)
        rows = np.arange(n)
        first, again = rng.permuted(np.tile(np.arange(boxes), (n, 1)), axis=1)[:, :2].T

        def doubled(contexts: "Contexts") -> "Contexts":
            objects = contexts.objects.copy()
            objects[rows, again] = objects[rows, first]
            return Contexts(objects, contexts.labels)

        contexts = draw_contexts(rng, split, n, boxes, fixed=doubled, pool=vocabulary.pool)
        ids = render(vocabulary, context_pattern(STANDARD, boxes, 0).words + QUESTION, contexts)
        named = np.array([np.delete(row, place) for row, place in zip(contexts.objects, again, strict=True)])
        answer = vocabulary.objects[contexts.objects[rows, first]]
        return Prompts.from_numpy(ids, answer[:, None], answer, vocabulary.objects[named])

    def shortcuts(self, prompts: "Prompts", vocabulary: "Vocabulary") -> dict[str, float]:
        """`random_object` of those named; `random_clause`, the object of a random clause."""
        named = prompts.objects.shape[1]
        return {"random_object": 1 / named, "random_clause": 2 / (named + 1)}

    def naming(self, boxes: int) -> float:
        return 2 / boxes


TASK = Repeats()
