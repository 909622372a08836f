"""The words of the tasks: objects, box labels, numbers and the few words of the templates, each one token."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

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


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of the words.

    Attributes:
        ids: word -> token id.
        objects: token id of every object, in the order of OBJECTS.
        labels: token id of every box label, in the order of LABELS.
        numbers: token id of every number, from 1 on.
    """

    ids: dict[str, int]
    objects: Int[np.ndarray, "objects"]
    labels: Int[np.ndarray, "labels"]
    numbers: Int[np.ndarray, "numbers"]

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, words: Sequence[str]) -> list[int]:
        """Token ids of words that are all in the vocabulary.

        Raises:
            KeyError: a word is not.
        """
        return [self.ids[word] for word in words]


def vocabulary() -> Vocabulary:
    """The vocabulary of the word-level tokenizer; a word's token id is its place in WORDS."""
    ids = {word: index for index, word in enumerate(WORDS)}
    return Vocabulary(
        ids,
        np.array([ids[word] for word in OBJECTS]),
        np.array([ids[word] for word in LABELS]),
        np.array([ids[word] for word in NUMBERS]),
    )
