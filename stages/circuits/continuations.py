"""Answers of several tokens as sums over rows: how `Pairs` become rectangles with measures.

log p(a b | prompt) = log p(a | prompt) + log p(b | prompt a). So a *row* is a prompt with the first tokens of some
continuation, read at its last token, and its measure is a weighted sum of log-probabilities of next tokens; the
measure of an example is the sum over its rows. Continuations that begin alike share rows. Where the weights of a row
add up to 0, as in the first row of every example, the normalisation cancels, and only the logits of its tokens are
needed.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Int
from torch import Tensor

from stages.circuits.pairs import AlignedPairs, Pairs, rectangle
from stages.circuits.readout import LogitSum, LogProbabilitySum


@dataclass(frozen=True)
class Rectangle:
    """Rows of one length.

    Attributes:
        pairs: the rows.
        measure: the part of the measure of their examples that is read there.
        example: whose rows they are.
    """

    pairs: AlignedPairs
    measure: LogitSum | LogProbabilitySum
    example: Int[Tensor, "m"]


@dataclass(frozen=True)
class _Row:
    """A prompt with the first tokens of some of its continuations.

    Attributes:
        example: of which it is a row.
        given: these tokens.
        weights: next token -> weight of its log-probability.
        answer: the next token of the answer, -1 where these tokens are not the answer's.
    """

    example: int
    given: tuple[int, ...]
    weights: dict[int, Fraction]
    answer: int


def rectangles(pairs: Pairs) -> list[Rectangle]:
    """Rows of equal length together, short ones first."""
    groups: dict[tuple[int, int, bool], list[_Row]] = defaultdict(list)
    for row in _rows(pairs):
        clean, corrupt = (len(ids[row.example]) + len(row.given) for ids in (pairs.clean, pairs.corrupt))
        groups[clean, corrupt, sum(row.weights.values()) != 0].append(row)
    return [_rectangle(pairs, rows, normalised) for (*_, normalised), rows in sorted(groups.items())]


def _rows(pairs: Pairs) -> Iterator[_Row]:
    for example in range(len(pairs)):
        weights: dict[tuple[int, ...], dict[int, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
        answer, others = pairs.answer[example], pairs.others[example]
        for continuation, weight in [(answer, Fraction(1)), *((other, Fraction(-1, len(others))) for other in others)]:
            for length, token in enumerate(continuation):
                weights[continuation[:length]][token] += weight
        for given, of_tokens in weights.items():
            right = answer[len(given)] if given == answer[: len(given)] and len(given) < len(answer) else -1
            yield _Row(example, given, dict(of_tokens), right)


def _rectangle(pairs: Pairs, rows: list[_Row], normalised: bool) -> Rectangle:
    most = max(len(row.weights) for row in rows)
    tokens = torch.zeros(len(rows), most, dtype=torch.long, device="cpu")
    weights = torch.zeros(len(rows), most, dtype=torch.float64, device="cpu")
    for number, row in enumerate(rows):
        for at, (token, weight) in enumerate(row.weights.items()):
            tokens[number, at], weights[number, at] = token, float(weight)
    answer = torch.tensor([row.answer for row in rows], device="cpu")
    aligned = AlignedPairs(
        torch.tensor([[*pairs.clean[row.example], *row.given] for row in rows], device="cpu"),
        torch.tensor([[*pairs.corrupt[row.example], *row.given] for row in rows], device="cpu"),
        *(
            {name: rectangle([of_name[row.example] for row in rows]) for name, of_name in spans.items()}
            for spans in (pairs.spans, pairs.corrupt_spans)
        ),
    )
    measure = (LogProbabilitySum if normalised else LogitSum)(tokens, weights, answer)
    return Rectangle(aligned, measure, torch.tensor([row.example for row in rows], device="cpu"))
