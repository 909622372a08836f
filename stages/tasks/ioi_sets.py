"""Sets of IOI prompts (`ioi.py`) of equal length, as an old task and a new one has them.

1. Wordings are said so that their tokens stand in the same places (ALIGNED): prompts are equally long, positions have
   one meaning in all of them, and mean head outputs are those of one place of a sentence. Where a tokenizer makes other
   lengths of a wording than of the first one, only those that agree are used; words of several tokens are not.
2. A pair of names, in whichever order and whoever is repeated, belongs to exactly one split by a hash. Names of corrupt
   partners are any others, as they ask for nothing.
3. Wordings and orders of the two names come in turn, places and things at random.

Desiderata, after the two signals that Wang et al. 2022 (section 3.3) find in S-inhibition heads, and what is moved.
Base and source have the same wording; if a group of heads carries
- `name_value`: the name that is moved, the base answers the source's. Source: two other names, in any order;
- `s_position`: where the repeated name stands, the base answers its own repeated name, as the source, of two other
  names in the other order, repeats the one that stands where the base's answer does;
- `s_identity`: which name is repeated, the base answers its own repeated name, as the source repeats, in the same
  place, the base's answer. Its other name is none of the base's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import SPLITS, Split, hashed_splits
from stages.tasks.examples import DesiderataPairs, Examples, Prompts
from stages.tasks.ioi import AFTER_S1, END, IO, NAMES, PLACES, S1, S2, THINGS, WORDINGS, Encoder
from stages.tasks.vocabulary import TextVocabulary, Vocabulary

ALIGNED = {
    "gave": WORDINGS["gave"],
    "met": "After {a} and {b} met at the {place}, {s} handed a {thing} to",
}
SLOTS = A, B, S, PLACE, THING = "a", "b", "s", "place", "thing"


@dataclass(frozen=True, eq=False)
class Sentences:
    """What a tokenizer can say.

    Attributes:
        wordings: name -> token ids of a prompt.
        at: slot -> its place in all of them.
        names: token id of each of NAMES; -1 where it is not one token.
        places, things: token ids of those that are one.
    """

    wordings: dict[str, tuple[int, ...]]
    at: dict[str, int]
    names: Int[np.ndarray, "names"]
    places: Int[np.ndarray, "places"]
    things: Int[np.ndarray, "things"]

    @cached_property
    def pairs(self) -> dict[str, Int[np.ndarray, "pairs 2"]]:
        """Split -> its pairs of names, indices into NAMES, the smaller one first."""
        usable = np.flatnonzero(self.names >= 0)
        first, second = np.triu_indices(len(usable), 1)
        every = np.stack([usable[first], usable[second]], axis=1)
        split = hashed_splits(every, salt=len(NAMES))
        return {name: every[split == number] for number, name in enumerate(SPLITS)}

    def of(self, split: Split) -> Int[np.ndarray, "pairs 2"]:
        """The pairs of a split.

        Raises:
            Invalid: there is none.
        """
        found = self.pairs[split]
        if not len(found):
            raise Invalid(f"no pair of the {int((self.names >= 0).sum())} names of one token is in split '{split}'")
        return found


@cache
def sentences_of(vocabulary: Vocabulary) -> Sentences:
    """What the tokenizer of a vocabulary can say.

    Raises:
        Invalid: names, places or things are not one token each, as those of the word-level tokenizer.
    """
    if not isinstance(vocabulary, TextVocabulary):
        raise Invalid("the word-level tokenizer has no names: must be one of a pretrained model")
    encode = Encoder(vocabulary.tokenizer, vocabulary.bos)
    tokens = encode.names(list(ALIGNED.values()))
    x, y, z, other = list(tokens)[:4]
    usual = dict(zip(SLOTS, (x, y, z, PLACES[0], THINGS[0]), strict=True))
    changed = dict(zip(SLOTS, (other, other, other, PLACES[1], THINGS[1]), strict=True))
    wordings: dict[str, tuple[int, ...]] = {}
    places: dict[str, int] = {}
    for wording, text in ALIGNED.items():
        ids = encode(text.format(**usual))
        differ = {slot: _difference(ids, encode(text.format(**usual | {slot: changed[slot]}))) for slot in SLOTS}
        found = {slot: place for slot, place in differ.items() if place is not None}
        if len(found) == len(SLOTS) and (not wordings or (found == places and len(ids) == _length(wordings))):
            wordings[wording], places = ids, found
    if not wordings:
        raise Invalid("places and things of IOI are not one token each for this tokenizer: must be one with such words")

    def one_token(slot: str, words: Sequence[str]) -> Int[np.ndarray, "words"]:
        """Token ids of the words that are that one token in every wording."""
        good = []
        for word in words:
            said = [encode(ALIGNED[wording].format(**usual | {slot: word})) for wording in wordings]
            alone = all(
                ids == usually or _difference(ids, usually) == places[slot]
                for ids, usually in zip(said, wordings.values(), strict=True)
            )
            if alone and len({ids[places[slot]] for ids in said}) == 1:
                good.append(said[0][places[slot]])
        return np.array(good)

    names = np.array([tokens.get(name, -1) for name in NAMES])
    return Sentences(wordings, places, names, one_token(PLACE, PLACES), one_token(THING, THINGS))


def _length(wordings: dict[str, tuple[int, ...]]) -> int:
    return len(next(iter(wordings.values())))


def _difference(ids: Sequence[int], others: Sequence[int]) -> int | None:
    """The one place where two equally long texts differ; None if there are others or none."""
    places = [place for place, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b]
    return places[0] if len(places) == 1 and len(ids) == len(others) else None


@dataclass(frozen=True)
class Drawn:
    """Prompts before they are said: indices into the wordings, NAMES, places and things."""

    wording: Int[np.ndarray, "n"]
    io: Int[np.ndarray, "n"]
    s: Int[np.ndarray, "n"]
    io_first: Bool[np.ndarray, "n"]
    place: Int[np.ndarray, "n"]
    thing: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.io)


def draw(rng: np.random.Generator, sentences: Sentences, split: Split, n: int) -> Drawn:
    """Draw prompts whose pairs of names are of the split."""
    pairs, turn = sentences.of(split), np.arange(n)
    chosen = rng.permuted(pairs[rng.integers(len(pairs), size=n)], axis=1)
    place, thing = (rng.integers(len(words), size=n) for words in (sentences.places, sentences.things))
    return Drawn(turn // 2 % len(sentences.wordings), chosen[:, 0], chosen[:, 1], turn % 2 == 0, place, thing)


def say(sentences: Sentences, drawn: Drawn, names: Int[np.ndarray, "3 n"] | None = None) -> Int[np.ndarray, "n t"]:
    """Token ids of prompts; `names` are said instead of the first, the second and the repeated one."""
    a, b = np.where(drawn.io_first, drawn.io, drawn.s), np.where(drawn.io_first, drawn.s, drawn.io)
    first, second, third = (a, b, drawn.s) if names is None else names
    ids = np.array(list(sentences.wordings.values()))[drawn.wording]
    for slot, name in ((A, first), (B, second), (S, third)):
        ids[:, sentences.at[slot]] = sentences.names[name]
    ids[:, sentences.at[PLACE]] = sentences.places[drawn.place]
    ids[:, sentences.at[THING]] = sentences.things[drawn.thing]
    return ids


def positions(sentences: Sentences, drawn: Drawn) -> dict[str, Int[Tensor, "n"]]:
    """Index of every position of `ioi.POSITIONS`."""
    at, n = sentences.at, len(drawn)
    io = np.where(drawn.io_first, at[A], at[B])
    s1 = np.where(drawn.io_first, at[B], at[A])
    s2, end = np.full(n, at[S]), np.full(n, _length(sentences.wordings) - 1)
    found = {IO: io, S1: s1, AFTER_S1: s1 + 1, S2: s2, END: end}
    return {name: torch.from_numpy(places) for name, places in found.items()}


def draw_examples(rng: np.random.Generator, sentences: Sentences, split: Split, n: int) -> Examples:
    """Prompts with their "ABC" partners: three other names, each once."""
    drawn = draw(rng, sentences, split, n)
    partner = _other_names(rng, sentences, np.stack([drawn.io, drawn.s], axis=1), 3)
    where = positions(sentences, drawn)
    return Examples(
        torch.from_numpy(say(sentences, drawn)),
        torch.from_numpy(sentences.names[drawn.io]),
        torch.from_numpy(sentences.names[drawn.s][:, None]),
        where,
        {},
        torch.from_numpy(say(sentences, drawn, partner.T)),
        dict(where),
    )


def draw_prompts(rng: np.random.Generator, sentences: Sentences, split: Split, n: int) -> Prompts:
    """The task as a new one; `objects` are the two names as they come."""
    drawn = draw(rng, sentences, split, n)
    answer, names = sentences.names[drawn.io], sentences.names[np.stack([drawn.io, drawn.s], axis=1)]
    objects = np.where(drawn.io_first[:, None], names, names[:, ::-1])
    return Prompts.from_numpy(say(sentences, drawn), answer[:, None], answer, objects)


def draw_pairs(
    rng: np.random.Generator, sentences: Sentences, hypothesis: str, split: Split, n: int
) -> DesiderataPairs:
    """Base and source prompts of one split.

    Base pairs for which the split has no source are left out.

    Raises:
        Invalid: there are no others.
    """
    of = sentences.of(split)
    every = np.concatenate([of, of[:, ::-1]])
    sources = [of[_fits(hypothesis, of, own)] for own in every]
    asked = np.flatnonzero([len(fit) > 0 for fit in sources])
    if not len(asked):
        raise Invalid(f"desideratum '{hypothesis}': the {len(of)} pairs of names in split '{split}' are too few for it")
    chosen = asked[rng.integers(len(asked), size=n)]
    base = replace(draw(rng, sentences, split, n), io=every[chosen, 0], s=every[chosen, 1])
    drawn = draw(rng, sentences, split, n)
    io, s = rng.permuted([sources[row][rng.integers(len(sources[row]))] for row in chosen], axis=1).T
    if hypothesis == "s_identity":
        io, s = np.where(io == base.io, s, io), base.io
    order = {"name_value": rng.random(n) < 0.5, "s_position": ~base.io_first, "s_identity": base.io_first}[hypothesis]
    source = Drawn(base.wording, io, s, order, drawn.place, drawn.thing)
    return DesiderataPairs(
        torch.from_numpy(say(sentences, base)),
        torch.from_numpy(say(sentences, source)),
        torch.from_numpy(sentences.names[io if hypothesis == "name_value" else base.s]),
        torch.from_numpy(sentences.names[base.io]),
        positions(sentences, base),
        positions(sentences, source),
    )


def _fits(hypothesis: str, pairs: Int[np.ndarray, "pairs 2"], own: Int[np.ndarray, "2"]) -> Bool[np.ndarray, "pairs"]:
    """Which pairs of names a source may have for a base prompt with its own, io and s."""
    has_io, has_s = ((pairs == name).any(axis=1) for name in own)
    return has_io & ~has_s if hypothesis == "s_identity" else ~(has_io | has_s)


def _other_names(
    rng: np.random.Generator, sentences: Sentences, without: Int[np.ndarray, "n k"], count: int
) -> Int[np.ndarray, "n count"]:
    """Distinct names of each row, none of those of `without`."""
    keys = rng.random((len(without), len(NAMES)))
    keys[:, sentences.names < 0] = 2.0
    np.put_along_axis(keys, without, 2.0, axis=1)
    return np.argsort(keys, axis=1)[:, :count]
