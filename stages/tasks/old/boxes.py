"""Old task `boxes`: entity tracking, which object is in a box (`stages/tasks/entity_tracking.py`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Split
from stages.tasks.old_task import OldTask, PaperHop
from stages.tasks.templates import STANDARD, TEMPLATES

if TYPE_CHECKING:
    from torch import Tensor

    from stages.tasks.examples import DesiderataPairs, Examples, Prompts


class Boxes(OldTask):
    """See `OldTask`. The hops are those of Prakash et al. 2024, section 3 and appendix."""

    name = "boxes"
    title = "entity tracking"
    same_as = "contains"
    positions = {
        "earlier_object": "object",
        "earlier_label": "label in the clause",
        "earlier_separator": "separator",
        "query_label": "query label",
        "last": "last token",
    }
    display = {"earlier_label": "label", "earlier_object": "object", "earlier_separator": "separator"}
    root = "fetch_answer"
    paper_hops = (
        PaperHop("value_fetcher", "last", "logits", None),
        PaperHop("pos_transmitter", "last", "value_fetcher", "q"),
        PaperHop("pos_detector", "query_label", "pos_transmitter", "v"),
        PaperHop("struct_reader", "earlier_label", "pos_detector", "v"),
    )
    candidates = "the objects of the other boxes"
    desiderata = {
        "positional": "Positional: the place of the box among the boxes",
        "object_value": "Object value: the object itself",
        "box_label_value": "Box label value: the label of the box",
        "next_clause": "Next clause: a control",
    }
    wordings = tuple(name for name in TEMPLATES if name != STANDARD)
    carried = "the place, the object or the label of the box"
    desiderata_note = (
        "`next_clause` is a negative control; a name with a wording behind it has source prompts of that wording, with "
        "base prompts as ever."
    )

    def examples(self, rng: np.random.Generator, split: Split, n: int) -> "Examples":
        from stages.tasks.entity_tracking import draw_examples

        return draw_examples(rng, self.vocabulary, split, n, self.boxes)

    def means(self, rng: np.random.Generator, split: Split, n: int) -> "Examples":
        from stages.tasks.entity_tracking import draw_examples

        return draw_examples(rng, self.vocabulary, split, n, self.boxes, random_query=True)

    def prompts(self, rng: np.random.Generator, split: Split, n: int) -> "Prompts":
        from stages.tasks.new.contains import TASK

        return TASK.draw(rng, self.vocabulary, split, n, self.boxes)

    def sign(self) -> str:
        from stages.tasks.new.contains import TASK

        return TASK.sign(self.vocabulary)

    def shortcuts(self, prompts: "Prompts") -> dict[str, float]:
        from stages.tasks.shortcuts import shortcut_scores

        return shortcut_scores(prompts, self.vocabulary)

    @classmethod
    def naming(cls, boxes: int) -> float:
        return 1 / boxes

    def pairs(self, rng: np.random.Generator, desideratum: str, split: Split, n: int) -> "DesiderataPairs":
        from stages.tasks.desiderata import draw_pairs

        return draw_pairs(rng, self.vocabulary, desideratum, split, n, self.boxes)

    def floors(self, pairs: "DesiderataPairs") -> dict[str, float]:
        from stages.tasks.desiderata import floors

        return floors(pairs, self.vocabulary, self.boxes)

    def variants(
        self, rng: np.random.Generator, n: int
    ) -> "Iterator[tuple[str, str, Int[Tensor, 'n t'], Int[Tensor, 'n']]]":
        """Every wording that the tokenizer says with equally many tokens whatever is asked for, and fewer boxes."""
        from stages.tasks.entity_tracking import draw_queries

        for template in TEMPLATES:
            try:
                found = draw_queries(rng, self.vocabulary, template, Split.SELECTION, n, self.boxes)
            except Invalid:
                continue
            yield "templates", template, *found
        for size in range(2, self.boxes):
            yield "fewer_boxes", str(size), *draw_queries(rng, self.vocabulary, STANDARD, Split.SELECTION, n, size)


TASK = Boxes
