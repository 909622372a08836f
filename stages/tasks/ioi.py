"""Indirect object identification (IOI) for any tokenizer: "When Mary and John went to the store, John gave a drink to".

The answer is the name that occurs once (io, Mary), not the one that occurs twice (s, John). Source: Wang et al.,
"Interpretability in the wild" (2022). A model may use another circuit for another wording, so there are several
wordings, and both orders of the two names, equally often.

The corrupt partner of a prompt is Wang et al.'s "ABC": the same words, with a name of its own in each of the three
places, none of them io or s. It asks for a name and says no more of which one, so all that a head knows of the answer
(which name, where, that it is a repeated one) is gone in its corrupt output, and what it knows of the sentence stays.

Names must be one token where they stand, and as answers; which ones are, is asked of the tokenizer. Where they stand
in a prompt is found by searching its tokens, so prompts may have any lengths and words any number of tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from stages.pipeline.stage import Invalid
from stages.pipeline.tokens import bos_ids

# {a} and {b} are the two names in either order, {s} is the one that occurs twice
WORDINGS = {
    "gave": "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "decided": "Then, {a} and {b} were working at the {place}. {s} decided to give a {thing} to",
    "argued": "Afterwards {a} and {b} had a long argument at the {place}, and {s} said to",
}
NAMES = tuple(
    """Mary John Tom James Dan Martin Amy Sarah Michael David Paul Robert Mark Peter Anna Emma Alice Laura Lisa Kate
    George Henry Jack Daniel William Thomas Charles Richard Joseph Andrew Edward Simon Susan Linda Karen Nancy Helen
    Maria Rachel Julia Emily Jane Rose Ruth Adam Ryan Kevin Brian Jason Eric""".split()
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
THINGS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")
# names of positions: the two names as they come, the token after the repeated one, and the last token
POSITIONS = IO, S1, AFTER_S1, S2, END = "io", "s1", "s1+1", "s2", "end"


@dataclass(frozen=True)
class IoiPrompt:
    """One prompt with its corrupt partner.

    Attributes:
        clean, corrupt: the texts.
        answer: the name that occurs once, as it goes on from the prompt: with a space before it.
        other: the name that occurs twice, likewise.
        clean_ids, corrupt_ids: token ids of the texts, with the special token in front where there is one.
        answer_id, other_id: token id of the answer, and of the other name.
        positions: "io", "s1", "s1+1", "s2", "end" -> index in `clean_ids`, the same one in `corrupt_ids`.
        wording: key of WORDINGS.
        io_first: whether io is the first of the two names.
    """

    clean: str
    corrupt: str
    answer: str
    other: str
    clean_ids: tuple[int, ...]
    corrupt_ids: tuple[int, ...]
    answer_id: int
    other_id: int
    positions: dict[str, int]
    wording: str
    io_first: bool


@dataclass(frozen=True)
class IoiPrompts:
    """Prompts in the order in which they were drawn, and what they were drawn from.

    Attributes:
        prompts: wordings and orders of the names in turn.
        bos: the special token in front of every prompt, which the texts do not hold.
        names: the names that were drawn from.
        dropped: those of NAMES that are not one token for this tokenizer.
    """

    prompts: tuple[IoiPrompt, ...]
    bos: str | None
    names: tuple[str, ...]
    dropped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def texts(self) -> dict[str, Any]:
        """What pairs are made of: clean, corrupt, answer, others, positions and bos, by these names."""
        return {
            "clean": [prompt.clean for prompt in self.prompts],
            "corrupt": [prompt.corrupt for prompt in self.prompts],
            "answer": [prompt.answer for prompt in self.prompts],
            "others": [prompt.other for prompt in self.prompts],
            "positions": {name: [prompt.positions[name] for prompt in self.prompts] for name in POSITIONS},
            "bos": self.bos,
        }


def ioi_prompts(
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int,
    wordings: Sequence[str] = tuple(WORDINGS),
    bos: str | None = None,
) -> IoiPrompts:
    """Draw prompts with corrupt partners: wordings and orders of the names in turn, everything else at random.

    Args:
        tokenizer: that of the model.
        n: number of prompts.
        seed: equal seeds give equal prompts.
        wordings: keys of WORDINGS.
        bos: token in front of every prompt, e.g. `tokenizer.bos_token`; None: nothing is.

    Raises:
        Invalid: there is no such wording or token, or fewer than five names are one token for this tokenizer.
    """
    if n < 1 or not wordings or set(wordings) - set(WORDINGS):
        raise Invalid(f"n = {n}, wordings = {list(wordings)}: must be prompts of some of {', '.join(WORDINGS)}")
    encode = Encoder(tokenizer, bos_ids(tokenizer, bos))
    tokens = encode.names([WORDINGS[wording] for wording in wordings])
    generator = np.random.default_rng(seed)
    prompts = []
    for number in range(n):
        wording, io_first = wordings[number // 2 % len(wordings)], number % 2 == 0
        io, s, x, y, z = (list(tokens)[i] for i in generator.choice(len(tokens), 5, replace=False))
        words = {"place": str(generator.choice(PLACES)), "thing": str(generator.choice(THINGS))}
        clean, corrupt = (said(WORDINGS[wording], *names, io_first, words) for names in ((io, s, s), (x, y, z)))
        ids, corrupt_ids = encode(clean), encode(corrupt)
        at = _positions(ids, corrupt_ids, tokens[io], tokens[s], clean)
        answer, other = f" {io}", f" {s}"
        prompts.append(
            IoiPrompt(clean, corrupt, answer, other, ids, corrupt_ids, tokens[io], tokens[s], at, wording, io_first)
        )
    return IoiPrompts(tuple(prompts), bos, tuple(tokens), tuple(name for name in NAMES if name not in tokens))


class Encoder:
    """Texts as token ids, behind those of `first`."""

    def __init__(self, tokenizer: Any, first: tuple[int, ...]) -> None:
        self._tokenizer, self._first = tokenizer, first
        self._unknown = tokenizer.unk_token_id

    def __call__(self, text: str) -> tuple[int, ...]:
        return (*self._first, *self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def names(self, texts: Sequence[str]) -> dict[str, int]:
        """Those of NAMES that are one token in these wordings, with it.

        Raises:
            Invalid: they are fewer than five, which a prompt and its corrupt partner need.
        """
        tokens = {name: token for name in NAMES if (token := self._name(name, texts)) is not None}
        if len(tokens) < 5:
            raise Invalid(f"{len(tokens)} of {len(NAMES)} names are one token for this tokenizer: must be at least 5")
        return tokens

    def _name(self, name: str, texts: Sequence[str]) -> int | None:
        """The one token that a name is as an answer and in every place of a prompt; None if it is more, or not known.

        That is so if the answer is one token after the prompt, and the same token is in the prompt once where the
        name is io and twice where it is s, in either order.
        """
        other = NAMES[0] if name != NAMES[0] else NAMES[1]
        words = {"place": PLACES[0], "thing": THINGS[0]}
        found = set()
        for text in texts:
            for io_first in (True, False):
                for count, io, s in ((1, name, other), (2, other, name)):
                    prompt = said(text, io, s, s, io_first, words)
                    ids, longer = self(prompt), self(f"{prompt} {name}")
                    if longer[:-1] != ids or ids.count(longer[-1]) != count:
                        return None
                    found.add(longer[-1])
        return found.pop() if len(found) == 1 and found != {self._unknown} else None


def said(text: str, io: str, s1: str, s2: str, io_first: bool, words: Mapping[str, str]) -> str:
    """A prompt: a wording with its names, place and thing."""
    a, b = (io, s1) if io_first else (s1, io)
    return text.format(a=a, b=b, s=s2, **words)


def _positions(clean: tuple[int, ...], corrupt: tuple[int, ...], io: int, s: int, text: str) -> dict[str, int]:
    """Where the names of a prompt are, found by their tokens.

    Raises:
        Invalid: io is not there once and s twice, or the corrupt prompt differs anywhere else.
    """
    at_io, at_s = ([place for place, token in enumerate(clean) if token == name] for name in (io, s))
    differ = [place for place, pair in enumerate(zip(clean, corrupt, strict=False)) if pair[0] != pair[1]]
    if len(at_io) != 1 or len(at_s) != 2 or len(clean) != len(corrupt) or differ != sorted(at_io + at_s):
        raise Invalid(f"'{text}': names are not one token each in every prompt of this tokenizer")
    return {IO: at_io[0], S1: at_s[0], AFTER_S1: at_s[0] + 1, S2: at_s[1], END: len(clean) - 1}
