"""Clean prompts with a corrupt partner each, and the positions in them that have names.

`Pairs` are prompts of any lengths, as one has them; `AlignedPairs` are one rectangle of them, as passes run them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from stages.circuits.texts import Place, read_texts
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class AlignedPairs:
    """Clean prompts of one length, with corrupt ones of one length, be it another. What a measure reads are the logits
    at the last token of each.

    Attributes:
        positions: semantic position -> the token, or the k tokens, where it is in each clean prompt; a span of fewer
            tokens repeats one of them.
        corrupt_positions: the same in the corrupt prompt, where a sender's corrupt output is taken from.

    Raises:
        Invalid: shapes do not fit each other, or a position lies outside its prompt.
    """

    clean_ids: Int[Tensor, "n t"]
    corrupt_ids: Int[Tensor, "n u"]
    positions: Mapping[str, Int[Tensor, "n ..."]]
    corrupt_positions: Mapping[str, Int[Tensor, "n ..."]]

    def __post_init__(self) -> None:
        shape, corrupt = list(self.clean_ids.shape), list(self.corrupt_ids.shape)
        if len(shape) != 2 or len(corrupt) != 2 or shape[0] != corrupt[0]:
            raise Invalid(
                f"clean_ids has shape {shape}, corrupt_ids {corrupt}: must be prompts by tokens, equally many"
            )
        _check_spans(self.positions, shape[0], shape[1], "positions")
        _check_spans(self.corrupt_positions, shape[0], corrupt[1], "corrupt_positions")
        if set(self.positions) - set(self.corrupt_positions):
            missing = ", ".join(sorted(set(self.positions) - set(self.corrupt_positions)))
            raise Invalid(f"corrupt_positions lacks {missing}: must name every position that positions names")
        for name, at in self.spans.items():
            if at.shape != self.corrupt_spans[name].shape:
                raise Invalid(
                    f"positions['{name}'] has {at.shape[1]} tokens, corrupt_positions['{name}'] "
                    f"{self.corrupt_spans[name].shape[1]}: must be equally many, each the partner of one"
                )

    def __len__(self) -> int:
        return len(self.clean_ids)

    @property
    def spans(self) -> dict[str, Int[Tensor, "n k"]]:
        """The positions as spans, those of one token too."""
        return {name: at.view(len(at), -1) for name, at in self.positions.items()}

    @property
    def corrupt_spans(self) -> dict[str, Int[Tensor, "n k"]]:
        return {name: self.corrupt_positions[name].view(len(at), -1) for name, at in self.positions.items()}

    def select(self, index: Tensor | slice) -> "AlignedPairs":
        """Some of the pairs."""
        return AlignedPairs(
            self.clean_ids[index],
            self.corrupt_ids[index],
            {name: at[index] for name, at in self.positions.items()},
            {name: at[index] for name, at in self.corrupt_positions.items()},
        )


def _check_spans(positions: Mapping[str, Tensor], n: int, length: int, what: str) -> None:
    if not positions:
        raise Invalid(f"{what} is empty: must name at least one semantic position")
    for name, at in positions.items():
        shaped = at.ndim in (1, 2) and at.shape[0] == n and 0 not in at.shape[1:]
        if not shaped or at.dtype.is_floating_point or at.dtype.is_complex or at.dtype == torch.bool:
            raise Invalid(
                f"{what}['{name}'] has shape {list(at.shape)} and type {at.dtype}: must be {n} integers, one a prompt, "
                f"or {n} by k for spans of k tokens"
            )
        outside = ((at < 0) | (at >= length)).view(n, -1)
        if bool(outside.any()):
            row = int(outside.any(1).int().argmax())
            wrong = int(at.view(n, -1)[row][outside[row]][0])
            raise Invalid(f"{what}['{name}'] of example {row} = {wrong}: must be from 0 to {length - 1}")


@dataclass(frozen=True)
class Pairs:
    """Clean prompts of any lengths with a corrupt partner each, and what they may be answered with.

    The measure of an example is d = log p(answer) - mean over the others of log p(other); the difference of logits
    where all are single tokens. Of several tokens, each is read at the token before it, with those before it given;
    what heads write at a position of the prompt reaches a later reading through attention alone.

    Attributes:
        clean: token ids of each prompt.
        corrupt: of its partner, which may be of another length.
        answer: token ids of the right continuation of each clean prompt.
        others: of one or several wrong ones.
        spans: semantic position -> for each example the tokens where it is in the clean prompt.
        corrupt_spans: the partners of these tokens in the corrupt prompt.
        bos: the token that was put in front of every prompt, if one was.
        dropped: examples that were left out, by reason.

    Raises:
        Invalid: there are not equally many of each, something is empty, the answer is one of the others, or a position
            lies outside its prompt or has another number of tokens in the corrupt one.
    """

    clean: tuple[tuple[int, ...], ...]
    corrupt: tuple[tuple[int, ...], ...]
    answer: tuple[tuple[int, ...], ...]
    others: tuple[tuple[tuple[int, ...], ...], ...]
    spans: Mapping[str, tuple[tuple[int, ...], ...]]
    corrupt_spans: Mapping[str, tuple[tuple[int, ...], ...]]
    bos: str | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.clean)
        for what in ("corrupt", "answer", "others"):
            entries = len(getattr(self, what))
            if n == 0 or entries != n:
                raise Invalid(
                    f"{what} has {entries} entries: must be one for each of the {n} clean prompts, at least 1"
                )
        if not self.spans:
            raise Invalid("positions is empty: must name at least one semantic position")
        for row in range(n):
            answer, others = self.answer[row], self.others[row]
            if not answer or not others or not all(others) or answer in others:
                raise Invalid(
                    f"example {row} has answer {list(answer)} and others {[list(other) for other in others]}: must be "
                    "one answer and at least one other, of at least one token each, and different"
                )
        for name, spans in self.spans.items():
            corrupt = self.corrupt_spans.get(name, ())
            if len(spans) != n or len(corrupt) != n:
                raise Invalid(
                    f"position '{name}' has {len(spans)} spans, {len(corrupt)} in the corrupt prompts: must be {n} each"
                )
            for row, (span, partner) in enumerate(zip(spans, corrupt, strict=True)):
                lengths = len(self.clean[row]), len(self.corrupt[row])
                for at, length in zip((span, partner), lengths, strict=True):
                    if not at or min(at) < 0 or max(at) >= length:
                        raise Invalid(
                            f"position '{name}' of example {row} = {list(at)}: must be tokens from 0 to {length - 1}"
                        )
                if len(span) != len(partner):
                    raise Invalid(
                        f"position '{name}' of example {row} has {len(span)} tokens in the clean prompt and "
                        f"{len(partner)} in the corrupt one: must be equally many, each the partner of one"
                    )

    def __len__(self) -> int:
        return len(self.clean)

    @staticmethod
    def from_text(
        tokenizer: Any,
        clean: Sequence[str],
        corrupt: Sequence[str],
        *,
        answer: Sequence[str],
        others: Sequence[str] | Sequence[Sequence[str]],
        positions: Mapping[str, Place | Sequence[Place]],
        corrupt_positions: Mapping[str, Place | Sequence[Place]] | None = None,
        bos: str | None = None,
        unfit: Literal["refuse", "drop"] = "refuse",
    ) -> "Pairs":
        """Pairs from texts; no special token is added but `bos`.

        Args:
            tokenizer: of Hugging Face.
            answer: continuations, as they follow the prompts: mostly with a space in front.
            others: one for each example, or several.
            positions: where each is in the clean prompts, see `texts`; one place for all, or one for each example.
            corrupt_positions: where they are in the corrupt ones, for those that are elsewhere.
            bos: a token of the vocabulary to put in front of every prompt; models differ in whether they want one.
            unfit: what happens to an example of which a position is not found, or has another number of tokens in the
                corrupt prompt: it is refused, or left out and counted.

        Raises:
            Invalid: an example is unfit, a continuation does not begin a new token, or `bos` is no token.
        """
        elsewhere = {**positions, **(corrupt_positions or {})}
        return Pairs(**read_texts(tokenizer, clean, corrupt, answer, others, positions, elsewhere, bos, unfit))

    @property
    def positions(self) -> dict[str, Int[Tensor, "n ..."]]:
        """Semantic position -> its token in each clean prompt, or its tokens; a shorter span repeats its last one."""
        return {name: rectangle(spans) for name, spans in self.spans.items()}

    def select(self, rows: slice) -> "Pairs":
        """Some of the pairs."""
        return replace(
            self,
            clean=self.clean[rows],
            corrupt=self.corrupt[rows],
            answer=self.answer[rows],
            others=self.others[rows],
            spans={name: spans[rows] for name, spans in self.spans.items()},
            corrupt_spans={name: spans[rows] for name, spans in self.corrupt_spans.items()},
        )

    def record(self) -> dict[str, Any]:
        """What the pairs are, in numbers, for a record of what was run."""
        lengths = Counter((len(clean), len(corrupt)) for clean, corrupt in zip(self.clean, self.corrupt, strict=True))
        return {
            "examples": len(self),
            "lengths": [
                {"clean": clean, "corrupt": corrupt, "examples": count}
                for (clean, corrupt), count in sorted(lengths.items())
            ],
            "tokens_of_answers": _counts(len(answer) for answer in self.answer),
            "tokens_of_others": _counts(len(other) for others in self.others for other in others),
            "tokens_of_positions": {name: _counts(map(len, spans)) for name, spans in self.spans.items()},
            "bos": self.bos,
            "dropped": dict(self.dropped),
        }


def rectangle(spans: Sequence[tuple[int, ...]], tokens: int | None = None) -> Int[Tensor, "n ..."]:
    """Spans as one tensor: [n] where all have one token, else [n k]; a shorter span repeats its last token."""
    longest = max(map(len, spans)) if tokens is None else tokens
    filled = torch.tensor([[*span, *[span[-1]] * (longest - len(span))] for span in spans], device="cpu")
    return filled[:, 0] if longest == 1 else filled


def _counts(numbers: Iterable[int]) -> dict[str, int]:
    return {str(number): count for number, count in sorted(Counter(numbers).items())}
