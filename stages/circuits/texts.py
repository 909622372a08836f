"""From texts and a tokenizer to token ids, and from places in texts to tokens.

A *place* is an index of a token as the model sees it (0 is the BOS token, where there is one; -1 the last token of the
prompt), several such indices, or words: a string that must occur in the prompt just once, or `Words` that say which
of its occurrences. Words stand for all tokens that hold a part of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from stages.pipeline.stage import Invalid
from stages.pipeline.tokens import bos_ids


@dataclass(frozen=True)
class Words:
    """A string in a prompt.

    Attributes:
        text: the string, in the case in which it is written.
        occurrence: which one, from 0; negative from the end (-1: the last one); None: there must be just one.
        tokens: which of its tokens.
    """

    text: str
    occurrence: int | None = None
    tokens: Literal["all", "first", "last"] = "all"


Place = int | str | Words | tuple[int, ...]


class _Unfit(Exception):
    """Why an example cannot be used."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def read_texts(
    tokenizer: Any,
    clean: Sequence[str],
    corrupt: Sequence[str],
    answer: Sequence[str],
    others: Sequence[str] | Sequence[Sequence[str]],
    positions: Mapping[str, Place | Sequence[Place]],
    corrupt_positions: Mapping[str, Place | Sequence[Place]],
    bos: str | None,
    unfit: Literal["refuse", "drop"],
) -> dict[str, Any]:
    """The attributes of `Pairs`; arguments and errors as `Pairs.from_text`."""
    n = len(clean)
    for what, given in (("corrupt", corrupt), ("answer", answer), ("others", others)):
        if isinstance(given, str) or len(given) != n:
            raise Invalid(f"{what} has {len(given)} entries: must be a list of one for each of the {n} clean prompts")
    first = bos_ids(tokenizer, bos)
    found: dict[str, list[Any]] = {"clean": [], "corrupt": [], "answer": [], "others": []}
    spans: list[dict[str, tuple[int, ...]]] = []
    corrupt_spans: list[dict[str, tuple[int, ...]]] = []
    dropped: Counter[str] = Counter()
    for row in range(n):
        texts, partner = _Prompt(tokenizer, clean[row], first), _Prompt(tokenizer, corrupt[row], first)
        try:
            here = {name: texts.tokens(_of_row(place, row, n, name)) for name, place in positions.items()}
            there = {name: partner.tokens(_of_row(corrupt_positions[name], row, n, name)) for name in positions}
            for name in positions:
                if len(here[name]) != len(there[name]):
                    raise _Unfit(
                        f"'{name}' has another number of tokens in the corrupt prompt",
                        f"it has {len(here[name])} tokens in the clean prompt, {len(there[name])} in the corrupt one",
                    )
            of_row = others[row]
            wrong = [of_row] if isinstance(of_row, str) else list(of_row)
            continuations = [texts.continuation(text) for text in (answer[row], *wrong)]
        except _Unfit as error:
            if unfit == "refuse":
                raise Invalid(f"example {row}: {error.reason}: {error} (unfit='drop' leaves it out)") from None
            dropped[error.reason] += 1
            continue
        found["clean"].append(texts.ids)
        found["corrupt"].append(partner.ids)
        found["answer"].append(continuations[0])
        found["others"].append(tuple(continuations[1:]))
        spans.append(here)
        corrupt_spans.append(there)
    return {
        **{name: tuple(entries) for name, entries in found.items()},
        "spans": {name: tuple(row[name] for row in spans) for name in positions},
        "corrupt_spans": {name: tuple(row[name] for row in corrupt_spans) for name in positions},
        "bos": bos,
        "dropped": dict(sorted(dropped.items())),
    }


def _of_row(place: Place | Sequence[Place], row: int, n: int, name: str) -> Place:
    """The place of one example, where there is one for each (in a list)."""
    if not isinstance(place, list):
        return cast(Place, place)
    if len(place) != n:
        raise Invalid(f"position '{name}' has {len(place)} places: must be one for all examples, or a list of {n}")
    entry: Any = place[row]
    return tuple(entry) if isinstance(entry, list) else entry  # a span


class _Prompt:
    """A text with its tokens.

    Attributes:
        ids: with the BOS token, if there is one.
    """

    def __init__(self, tokenizer: Any, text: str, first: tuple[int, ...]) -> None:
        self._tokenizer, self._text, self._first = tokenizer, text, first
        self.ids = first + self._encoded(text)
        if not text or len(self.ids) == len(first):
            raise Invalid(f"prompt '{text}' has no tokens: must be a text")

    def continuation(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that follows the prompt."""
        whole = self._first + self._encoded(self._text + text)
        if whole[: len(self.ids)] != self.ids or len(whole) == len(self.ids):
            raise _Unfit(
                "a continuation does not begin a new token",
                f"'{text}' after '{self._text}' changes the last token of the prompt: must begin a token of its own, "
                "mostly with a space in front",
            )
        return whole[len(self.ids) :]

    def tokens(self, place: Place) -> tuple[int, ...]:
        """The tokens at a place."""
        if isinstance(place, (str, Words)):
            return self._of_words(Words(place) if isinstance(place, str) else place)
        length = len(self.ids)
        indices = (place,) if isinstance(place, int) else tuple(place)
        if not indices or any(not -length <= index < length for index in indices):
            raise _Unfit("no such token", f"{place} in '{self._text}': must be indices from -{length} to {length - 1}")
        return tuple(index % length for index in indices)

    def _of_words(self, words: Words) -> tuple[int, ...]:
        starts = [at for at in range(len(self._text)) if words.text and self._text.startswith(words.text, at)]
        if not starts:
            raise _Unfit(f"'{words.text}' not found", f"must occur in '{self._text}'")
        which = 0 if words.occurrence is None else words.occurrence
        if words.occurrence is None and len(starts) > 1:
            raise _Unfit(
                f"'{words.text}' found {len(starts)} times",
                f"must occur once in '{self._text}', or be Words with an occurrence (-1: the last one)",
            )
        if not -len(starts) <= which < len(starts):
            raise _Unfit(f"'{words.text}' found {len(starts)} times", f"there is no occurrence {which}")
        begin, end = starts[which], starts[which] + len(words.text)
        held = [
            len(self._first) + at for at, (left, right) in enumerate(self._offsets()) if left < end and right > begin
        ]
        if not held:
            raise _Unfit(f"'{words.text}' has no token of its own", f"in '{self._text}'")
        return tuple({"all": held, "first": held[:1], "last": held[-1:]}[words.tokens])

    def _offsets(self) -> list[tuple[int, int]]:
        """Where each token begins and ends in the text."""
        if getattr(self._tokenizer, "is_fast", False):
            encoded = self._tokenizer(self._text, add_special_tokens=False, return_offsets_mapping=True)
            return [(left, right) for left, right in encoded["offset_mapping"]]
        # without offsets: a token ends where the shortest text that begins with the same tokens does
        ends, own = [], self.ids[len(self._first) :]
        for at in range(1, len(self._text) + 1):
            begun = self._encoded(self._text[:at])
            while len(ends) < len(begun) and begun[: len(ends) + 1] == own[: len(ends) + 1]:
                ends.append(at)
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"])
