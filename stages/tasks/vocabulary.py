"""The words of the tasks: objects, box labels, numbers and the few words of the templates, as tokens.

Texts are written as words: a word-level tokenizer of the project's own (`tokenizer.py`) makes each one token, and any
other one what it makes of them where they stand. Objects and labels are asked for and answered, so they must be one
token; those that are several for a tokenizer are not used with it. Other words may be several.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from stages.pipeline.stage import Invalid
from stages.pipeline.tokens import bos_ids

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
# Words and marks of the templates in `templates.py` and of the relations in `relations.py`. Nothing else may
# occur there.
FUNCTION = tuple(
    "The the is in Box contains , . contained There there these are a bunch of boxes containing objects three"
    " additional and apple PP BB AA adjoins lacks precedes".split()
)
LABELS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
OBJECTS = tuple(
    "anchor balloon banana basket bell blanket bottle bowl bracelet brick broom brush bucket button"
    " candle carpet carrot chain chair cheese clock coat comb compass cookie cross crown cup curtain"
    " doll drum egg envelope fan feather flute fork glove guitar hammer hat helmet jacket jar kettle key"
    " kite knife ladder lamp lemon lock mirror needle onion orange paddle pan pencil phone piano pillow"
    " pipe plate potato purse ribbon ring rope saddle scarf shell shoe shovel soap spoon sword towel"
    " umbrella vase violin wallet whistle yarn zipper".split()
)
SIGNS = ("+", "=")
LARGEST_NUMBER = 15
NUMBERS = tuple(str(number) for number in range(1, LARGEST_NUMBER + 1))
WORDS = (*SPECIAL, *FUNCTION, *OBJECTS, *LABELS, *SIGNS, *NUMBERS)

SPLIT = re.compile(r"<\w+>|\w+|[^\w\s]")  # how the tokenizer cuts text: special tokens, words, single marks
MARKS = frozenset(",.;:?!")  # written without a space before them


@dataclass(frozen=True)
class Pool:
    """Which objects and labels contexts are made of.

    Attributes:
        objects: for each of OBJECTS.
        labels: for each of LABELS.
    """

    objects: Bool[np.ndarray, "objects"]
    labels: Bool[np.ndarray, "labels"]


EVERY_WORD = Pool(np.ones(len(OBJECTS), dtype=bool), np.ones(len(LABELS), dtype=bool))


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Token ids of the tasks' words. Equal to itself alone, so that what is made of one can be kept by it.

    Attributes:
        objects: token id of every object, in the order of OBJECTS; -1 where it is not one token.
        labels: token id of every box label, in the order of LABELS; likewise.
    """

    objects: Int[np.ndarray, "objects"]
    labels: Int[np.ndarray, "labels"]

    @property
    def pool(self) -> Pool:
        """The objects and labels that can be used."""
        return Pool(self.objects >= 0, self.labels >= 0)

    def pieces(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of the words of a text, one by one. BOS stands for what is put in front of a prompt, if anything.

        Raises:
            Invalid: the tokenizer does not know a word.
        """
        raise NotImplementedError

    def is_one_token(self, word: str) -> bool:
        """Whether a word inside a text is one token."""
        try:
            return len(self.pieces((BOS, "Box", word))[2]) == 1
        except Invalid:
            return False

    def check(self, words: Sequence[str], ids: Int[np.ndarray, "t"]) -> None:
        """Refuse ids that are not what the tokenizer makes of the words as one text.

        Raises:
            Invalid: they are not.
        """


@dataclass(frozen=True, eq=False)
class WordVocabulary(Vocabulary):
    """That of the word-level tokenizer: every word is one token, wherever it stands.

    Attributes:
        ids: word -> token id.
        numbers: token id of every number, from 1 on.
    """

    ids: dict[str, int]
    numbers: Int[np.ndarray, "numbers"]

    def __len__(self) -> int:
        return len(self.ids)

    def pieces(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            raise Invalid(f"the word-level tokenizer has no token for '{unknown[0]}': must be one of its words")
        return [(self.ids[word],) for word in words]

    def encode(self, words: Sequence[str]) -> list[int]:
        """Token ids of words that are all in the vocabulary.

        Raises:
            KeyError: a word is not.
        """
        return [self.ids[word] for word in words]


@dataclass(frozen=True, eq=False)
class TextVocabulary(Vocabulary):
    """That of any tokenizer.

    Attributes:
        tokenizer: of Hugging Face.
        bos: token id of what is put in front of every prompt; empty: nothing is.
    """

    tokenizer: Any
    bos: tuple[int, ...]

    def pieces(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        begins = True
        for word, text in zip(words, spaced(words), strict=True):
            of_text = _tokens if begins else _inside
            found.append(self.bos if word == BOS else of_text(self.tokenizer, text))
            begins = begins and not text
        return found

    def check(self, words: Sequence[str], ids: Int[np.ndarray, "t"]) -> None:
        text = "".join(spaced(words))
        whole = (*self.bos, *self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if whole != tuple(ids.tolist()):
            raise Invalid(
                f"the tokenizer makes other tokens of '{text}' as a whole than of its words one by one: must be one "
                "that cuts text at spaces and marks first, as those of GPT-2, Llama or Qwen do"
            )


@cache
def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
    if text and (not ids or tokenizer.unk_token_id in ids):
        raise Invalid(f"the tokenizer does not know '{text.strip()}': must be one with the words of the tasks")
    return ids


def _inside(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a part of a text that does not begin it: as Llama's does, a tokenizer may put a space in front of
    whatever it is given."""
    alone = _tokens(tokenizer, text)
    try:
        before, both = _tokens(tokenizer, "Box"), _tokens(tokenizer, f"Box{text}")
    except Invalid:  # it does not know that word
        return alone
    return both[len(before) :] if both[: len(before)] == before else alone


def spaced(words: Sequence[str]) -> list[str]:
    """The words as they are written in a text, with the space before them where there is one; nothing for BOS."""
    written: list[str] = []
    for word in words:
        begins = not "".join(written)
        written.append("" if word == BOS else word if begins or word in MARKS else f" {word}")
    return written


@cache
def vocabulary() -> WordVocabulary:
    """The vocabulary of the word-level tokenizer; a word's token id is its place in WORDS."""
    ids = {word: index for index, word in enumerate(WORDS)}
    objects, labels, numbers = (np.array([ids[word] for word in words]) for words in (OBJECTS, LABELS, NUMBERS))
    return WordVocabulary(objects, labels, ids, numbers)


def vocabulary_of(tokenizer: Any, bos: str | None) -> Vocabulary:
    """The vocabulary of a tokenizer; its own for the word-level one.

    Args:
        tokenizer: of Hugging Face.
        bos: token to put in front of every prompt; None: nothing is.

    Raises:
        Invalid: `bos` is no token of it.
    """
    if tokenizer.get_vocab() == vocabulary().ids:
        if bos != BOS:
            raise Invalid(f"bos = {bos!r}: must be '{BOS}' with the word-level tokenizer")
        return vocabulary()
    return TextVocabulary(
        np.array([_one_token(tokenizer, word) for word in OBJECTS]),
        np.array([_one_token(tokenizer, word) for word in LABELS]),
        tokenizer,
        bos_ids(tokenizer, bos),
    )


def _one_token(tokenizer: Any, word: str) -> int:
    """The one token that a word is inside a text; -1 if it is several, or not known."""
    try:
        ids = _inside(tokenizer, f" {word}")
    except Invalid:
        return -1
    return ids[0] if len(ids) == 1 else -1
