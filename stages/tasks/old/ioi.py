"""Old task `ioi`: indirect object identification (`stages/tasks/ioi.py`, `ioi_sets.py`)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from stages.tasks.contexts import Split
from stages.tasks.old_task import OldTask, PaperHop

if TYPE_CHECKING:
    from torch import Tensor

    from stages.tasks.examples import DesiderataPairs, Examples, Prompts
    from stages.tasks.vocabulary import Vocabulary


class Ioi(OldTask):
    """See `OldTask`. The hops are the main paths of Wang et al. 2022, figure 2: what is found at s2 are their induction
    and duplicate token heads together."""

    name = "ioi"
    title = "indirect object identification (IOI)"
    same_as = "ioi"
    positions = {
        "io": "the other name",
        "s1": "repeated name, first",
        "s1+1": "token after it",
        "s2": "repeated name, again",
        "end": "last token",
    }
    root = "move_name"
    paper_hops = (
        PaperHop("name_mover", "end", "logits", None),
        PaperHop("s_inhibition", "end", "name_mover", "q"),
        PaperHop("induction", "s2", "s_inhibition", "v"),
        PaperHop("previous_token", "s1+1", "induction", "k"),
    )
    candidates = "the name that is said twice"
    desiderata = {
        "name_value": "Name value: the name itself",
        "s_position": "S position: where the repeated name stands",
        "s_identity": "S identity: which name is repeated",
    }
    carried = "the name that is moved, the place of the repeated name, or which name that is"

    def __init__(self, vocabulary: "Vocabulary", boxes: int) -> None:
        from stages.tasks.ioi_sets import sentences_of

        super().__init__(vocabulary, boxes)
        self._sentences = sentences_of(vocabulary)

    def examples(self, rng: np.random.Generator, split: Split, n: int) -> "Examples":
        from stages.tasks.ioi_sets import draw_examples

        return draw_examples(rng, self._sentences, split, n)

    def means(self, rng: np.random.Generator, split: Split, n: int) -> "Examples":
        """The corrupt partners alone, as Wang et al. take means of."""
        drawn = self.examples(rng, split, n)
        return replace(drawn, input_ids=drawn.corrupt_ids)

    def prompts(self, rng: np.random.Generator, split: Split, n: int) -> "Prompts":
        from stages.tasks.ioi_sets import draw_prompts

        return draw_prompts(rng, self._sentences, split, n)

    def sign(self) -> str:
        return "to"

    def shortcuts(self, prompts: "Prompts") -> dict[str, float]:
        """`first_name`, `second_name`, `random_name` of the two; `last_name`, the one said last, which is the repeated
        one; `most_frequent_answer`, always the same name, the best one."""
        right = (prompts.objects == prompts.canonical[:, None]).double()
        last = prompts.input_ids[:, self._sentences.at["s"]]
        return {
            "first_name": float(right[:, 0].mean()),
            "second_name": float(right[:, 1].mean()),
            "random_name": float(right.mean()),
            "last_name": float((last == prompts.canonical).double().mean()),
            "most_frequent_answer": float(prompts.canonical.unique(return_counts=True)[1].max()) / len(prompts),
        }

    @classmethod
    def naming(cls, boxes: int) -> float:
        return 1 / 2  # one of two names

    def pairs(self, rng: np.random.Generator, desideratum: str, split: Split, n: int) -> "DesiderataPairs":
        from stages.tasks.ioi_sets import draw_pairs

        hypothesis, _ = self.parts(desideratum)
        return draw_pairs(rng, self._sentences, hypothesis, split, n)

    def floors(self, pairs: "DesiderataPairs") -> dict[str, float]:
        """`clean_answer`: share of pairs whose target is the clean answer; scores of naming a random name of the base,
        of base and source together, and of all."""
        in_base, in_source = ((ids == pairs.target[:, None]).any(1) for ids in (pairs.base_ids, pairs.source_ids))
        names = self._sentences.names
        named = np.array([np.isin(names, ids).sum() for ids in np.concatenate([pairs.base_ids, pairs.source_ids], 1)])
        return {
            "clean_answer": float((pairs.target == pairs.clean_answer).double().mean()),
            "random_base_name": float(in_base.double().mean()) / 2,
            "random_prompt_name": float(((in_base | in_source).numpy() / named).mean()),
            "random_name": 1 / int((names >= 0).sum()),
        }

    def variants(
        self, rng: np.random.Generator, n: int
    ) -> "Iterator[tuple[str, str, Int[Tensor, 'n t'], Int[Tensor, 'n']]]":
        """Every wording, and both orders of the names."""
        wordings = list(self._sentences.wordings)
        asked = self.examples(rng, Split.SELECTION, 2 * len(wordings) * n)
        number = np.arange(len(asked))
        for index, wording in enumerate(wordings):
            rows = number[number // 2 % len(wordings) == index][:n]
            yield "wordings", wording, asked.input_ids[rows], asked.answer[rows]
        for index, order in enumerate(("answer_first", "answer_second")):
            rows = number[number % 2 == index][:n]
            yield "orders", order, asked.input_ids[rows], asked.answer[rows]


TASK = Ioi
