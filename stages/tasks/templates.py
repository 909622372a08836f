"""How a context is said: the paper's template and its variants, written as text with slots.

A template is a text whose slots are `o3` (object of clause 3), `l3` (its label), and `x` (a label that the
context does not use); a pattern is that text as words, so a batch of contexts is turned into token ids by
one indexing operation. The variants are those of Prakash et al. (ICLR 2024), appendix on additional
desiderata, and the easy order `clause`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
from jaxtyping import Int

from stages.tasks.contexts import Contexts
from stages.tasks.vocabulary import BOS, LABELS, OBJECTS, SPLIT, Vocabulary

_SLOT = re.compile(r"([ol])(\d+)|x")


@dataclass(frozen=True)
class Pattern:
    """A template for a number of boxes.

    Attributes:
        words: the words, slots among them.
        objects: index of the object of each clause in `words`.
        labels: index of its label.
        separators: index of the mark or word after the clause.
    """

    words: tuple[str, ...]
    objects: Int[np.ndarray, "boxes"]
    labels: Int[np.ndarray, "boxes"]
    separators: Int[np.ndarray, "boxes"]

    def __len__(self) -> int:
        return len(self.words)


def _clauses(boxes: int, clause: str = "the o{0} is in Box l{0}") -> list[str]:
    return [clause.format(i) for i in range(boxes)]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _standard(boxes: int, clause: int) -> str:
    return _capital(", ".join(_clauses(boxes)))


def _text_start(boxes: int, clause: int) -> str:
    return "There are a bunch of boxes containing objects, " + ", ".join(_clauses(boxes))


def _text_end(boxes: int, clause: int) -> str:
    return _capital(", ".join(_clauses(boxes))) + ", these are a bunch of boxes containing objects"


def _contained(boxes: int, clause: int) -> str:
    clauses = _clauses(boxes)
    clauses[clause] = f"the o{clause} is contained in the Box l{clause}"
    return _capital(", ".join(clauses))


def _segment_start(boxes: int, clause: int) -> str:
    return "The apple is in Box x, " + ", ".join(_clauses(boxes))


def _segment_end(boxes: int, clause: int) -> str:
    return _capital(", ".join(_clauses(boxes))) + ", the apple is in Box x"


def _add_box(boxes: int, clause: int) -> str:
    clauses = _clauses(boxes)
    clauses.insert(clause, "there are three additional boxes, Box PP, Box BB and Box AA")
    return _capital(", ".join(clauses))


def _other_order(boxes: int, clause: int) -> str:
    clauses = _clauses(boxes)
    clauses[clause] = f"Box l{clause} contains the o{clause}"
    return _capital(", ".join(clauses))


def _no_comma(boxes: int, clause: int) -> str:
    return _capital(" ".join(_clauses(boxes)))


def _add_comma(boxes: int, clause: int) -> str:
    return _capital(", ".join(_clauses(boxes, "the o{0}, is in Box l{0}")))


def _clause(boxes: int, clause: int) -> str:
    return ", ".join(_clauses(boxes, "Box l{0} contains the o{0}"))


# name -> (number of boxes, the clause that is said differently) -> text
TEMPLATES: dict[str, Callable[[int, int], str]] = {
    "standard": _standard,
    "text_start": _text_start,
    "text_end": _text_end,
    "contained": _contained,
    "segment_start": _segment_start,
    "segment_end": _segment_end,
    "add_box": _add_box,
    "other_order": _other_order,
    "no_comma": _no_comma,
    "add_comma": _add_comma,
    "clause": _clause,
}
STANDARD = "standard"


@cache
def context_pattern(template: str, boxes: int, clause: int) -> Pattern:
    """The pattern of `<bos>`, a context and its final period.

    Args:
        template: a key of TEMPLATES.
        boxes: number of clauses.
        clause: the clause that templates such as `contained` say differently.
    """
    words = tuple(SPLIT.findall(f"{BOS} {TEMPLATES[template](boxes, clause)}."))
    objects = np.array([words.index(f"o{i}") for i in range(boxes)])
    labels = np.array([words.index(f"l{i}") for i in range(boxes)])
    return Pattern(words, objects, labels, np.maximum(objects, labels) + 1)


@cache
def _slots(words: tuple[str, ...], boxes: int) -> tuple[int | None, ...]:
    """For each word, what it stands for: object of clause i is i, its label boxes + i, `x` 2 boxes; None: itself."""
    slots: list[int | None] = []
    for word in words:
        slot = _SLOT.fullmatch(word)
        if slot is None:
            slots.append(None)
        else:
            slots.append(2 * boxes if word == "x" else int(slot[2]) + (boxes if slot[1] == "l" else 0))
    return tuple(slots)


@cache
def _pieces(vocabulary: Vocabulary, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Token ids of the words; a slot is one token, whatever stands in it: -1."""
    is_slot = [_SLOT.fullmatch(word) is not None for word in words]
    pieces = vocabulary.pieces([OBJECTS[0] if slot else word for word, slot in zip(words, is_slot, strict=True)])
    return tuple((-1,) if slot else piece for piece, slot in zip(pieces, is_slot, strict=True))


def places(vocabulary: Vocabulary, words: tuple[str, ...]) -> Int[np.ndarray, "words_and_end"]:
    """Index of the first token of each word of a text with slots; then the number of tokens."""
    lengths = [len(piece) for piece in _pieces(vocabulary, words)]
    return np.array([0, *accumulate(lengths)])


def render(
    vocabulary: Vocabulary,
    words: tuple[str, ...],
    contexts: Contexts,
    extra_label: Int[np.ndarray, "n"] | None = None,
) -> Int[np.ndarray, "n t"]:
    """Token ids of a text with slots, for every context.

    Args:
        vocabulary: token ids of words.
        words: the words, slots among them.
        contexts: what the slots `o0`, `l0`, ... stand for.
        extra_label: label (index) that the slot `x` stands for; needed if it occurs.

    Returns:
        one row of token ids a context.
    """
    boxes = contexts.boxes
    extra = np.zeros(len(contexts), np.int64) if extra_label is None else extra_label
    labels = np.c_[contexts.labels, extra]
    table = np.concatenate([vocabulary.objects[contexts.objects], vocabulary.labels[labels]], axis=1)  # 2 boxes + 1
    columns: list[int] = []  # of the table; -1: a fixed token
    fixed: list[int] = []
    for slot, piece in zip(_slots(words, boxes), _pieces(vocabulary, words), strict=True):
        columns += [-1 if slot is None else slot] * len(piece)
        fixed += piece
    slots = np.array(columns)
    ids = np.where(slots < 0, np.array(fixed), table[:, np.maximum(slots, 0)])
    if len(ids):
        vocabulary.check(_filled(words, contexts, labels), ids[0])
    return ids


def _filled(words: tuple[str, ...], contexts: Contexts, labels: Int[np.ndarray, "n more"]) -> list[str]:
    """The words of the first context's text."""
    said = [OBJECTS[index] for index in contexts.objects[0]] + [LABELS[index] for index in labels[0]]
    slots = _slots(words, contexts.boxes)
    return [word if slot is None else said[slot] for word, slot in zip(words, slots, strict=True)]
