"""What an old task is: what a base knows, whose circuit is found, and what fine-tuning may keep of it.

An old task `<name>` is one file `stages/tasks/old/<name>.py` with one subclass of `OldTask`, called TASK there; the
param `old_task` names it. Its class attributes are what other stages are told of it (`described`), and what params are
checked against, so its file imports nothing heavy at its top.

The circuit engine knows of prompts their ids, answers, other candidates and named positions. Which positions stand in a
clause, and so in every clause, is said by the examples themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Split

if TYPE_CHECKING:
    from torch import Tensor

    from stages.tasks.examples import DesiderataPairs, Examples, Prompts
    from stages.tasks.vocabulary import Vocabulary


class PaperHop(NamedTuple):
    """A hop of the paper that found a circuit of the task."""

    name: str  # of the hop and of its group
    position: str  # of the senders
    receiver: str  # "logits", or the group of an earlier hop
    component: str | None  # input of the receiver: "q", "k" or "v"; None for the logits


class OldTask(ABC):
    """An old task as a tokenizer says it.

    Attributes:
        name: value of the param `old_task`.
        title: what the report calls it.
        same_as: the new task that asks the same.
        positions: name of a position in the examples -> what figures call it; in reading order.
        display: position -> how it is called in the names of hops and groups; the others are called as they are.
        root: name of the group that writes the answer into the logits.
        paper_hops: of the paper that found a circuit; none: it cannot be asked for.
        candidates: what a score compares the answer with: the other candidates of a prompt, in a few words.
        desiderata: hypothesis on what a group carries -> what figures call it.
        wordings: of sources; `<hypothesis>-<wording>` has source prompts that are said so.
        carried: what the hypotheses are about, in a few words.
        desiderata_note: what a reader of a table of desiderata must know.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    same_as: ClassVar[str]
    positions: ClassVar[Mapping[str, str]]
    display: ClassVar[Mapping[str, str]] = {}
    root: ClassVar[str]
    paper_hops: ClassVar[tuple[PaperHop, ...]] = ()
    candidates: ClassVar[str]
    desiderata: ClassVar[Mapping[str, str]]
    wordings: ClassVar[tuple[str, ...]] = ()
    carried: ClassVar[str]
    desiderata_note: ClassVar[str] = ""

    def __init__(self, vocabulary: "Vocabulary", boxes: int) -> None:
        """
        Args:
            vocabulary: token ids of words.
            boxes: clauses of a prompt, for a task that has them.

        Raises:
            Invalid: the tokenizer is not one for this task.
        """
        self.vocabulary, self.boxes = vocabulary, boxes

    @abstractmethod
    def examples(self, rng: np.random.Generator, split: Split, n: int) -> "Examples":
        """Prompts with corrupt partners."""

    @abstractmethod
    def means(self, rng: np.random.Generator, split: Split, n: int) -> "Examples":
        """Prompts, as long as the examples, whose mean head outputs say as little as possible of an answer."""

    @abstractmethod
    def prompts(self, rng: np.random.Generator, split: Split, n: int) -> "Prompts":
        """The same task as a new one: for arms that rehearse it, and to teach it to a base."""

    @abstractmethod
    def sign(self) -> str:
        """The word that says what is asked for."""

    @abstractmethod
    def shortcuts(self, prompts: "Prompts") -> dict[str, float]:
        """Name of a rule that does not solve the task -> how often it is right on these prompts."""

    @classmethod
    @abstractmethod
    def naming(cls, boxes: int) -> float:
        """The accuracy of naming any candidate of the prompt."""

    @abstractmethod
    def pairs(self, rng: np.random.Generator, desideratum: str, split: Split, n: int) -> "DesiderataPairs":
        """Base and source prompts of a desideratum.

        Raises:
            Invalid: there is no such one.
        """

    @abstractmethod
    def floors(self, pairs: "DesiderataPairs") -> dict[str, float]:
        """What pairs score without any information, by the rule that scores it."""

    @abstractmethod
    def variants(
        self, rng: np.random.Generator, n: int
    ) -> "Iterator[tuple[str, str, Int[Tensor, 'n t'], Int[Tensor, 'n']]]":
        """What a base is measured on beside the task itself: kind and name of a variant, prompts (selection split) and
        their answers."""

    @classmethod
    def parts(cls, desideratum: str) -> tuple[str, str | None]:
        """Hypothesis and wording of a desideratum.

        Raises:
            Invalid: one of them does not exist.
        """
        hypothesis, dash, wording = desideratum.partition("-")
        if hypothesis not in cls.desiderata or (dash and wording not in cls.wordings):
            said = f", alone or followed by '-' and the wording of the source ({', '.join(cls.wordings)})"
            raise Invalid(
                f"desideratum '{desideratum}': must be one of {', '.join(cls.desiderata)}{said if cls.wordings else ''}"
            )
        return hypothesis, wording or None

    @classmethod
    def described(cls) -> dict[str, Any]:
        """What stages are told that find, test and draw circuits; for a JSON file, so what has an order is a list."""
        return {
            "name": cls.name,
            "title": cls.title,
            "same_as": cls.same_as,
            "positions": [list(item) for item in cls.positions.items()],
            "display": dict(cls.display),
            "root": cls.root,
            "paper_hops": [list(hop) for hop in cls.paper_hops],
            "candidates": cls.candidates,
            "desiderata": [list(item) for item in cls.desiderata.items()],
            "carried": cls.carried,
            "desiderata_note": cls.desiderata_note,
        }
