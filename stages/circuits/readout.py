"""What is read from logits at the last token: the functions whose change is an effect."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.pipeline.stage import Invalid

# measure(logits [n e vocab], index [n]) -> [n e]: one number for each patched run of the examples at `index`. It may
# have an attribute `answer` [n]: the token that is right for each example, -1 where none is.
Measure = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class FewTokens(Protocol):
    """A measure that reads the logits of a few tokens only, so that no others are computed.

    Attributes:
        tokens: which tokens, for each example, [n k].
    """

    tokens: Int[Tensor, "n k"]

    def read(self, logits: Float[Tensor, "n e k"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        """The measure, from the logits of its tokens."""
        ...


@dataclass(frozen=True)
class TokenMeasure:
    """The same function of a few tokens' logits for every example.

    Attributes:
        tokens: which tokens, for each example.
        reduce: their logits -> one number each.
        check: refuses a number of tokens in the vocabulary, or examples, that the measure does not fit.
        answer: the right token of each example, where there is one.
    """

    tokens: Int[Tensor, "n k"]
    reduce: Callable[[Float[Tensor, "n e k"]], Float[Tensor, "n e"]]
    check: Callable[[int, Int[Tensor, "n"]], None] = lambda vocab, index: None
    answer: Int[Tensor, "n"] | None = None

    def read(self, logits: Float[Tensor, "n e k"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        return self.reduce(logits)

    def __call__(self, logits: Float[Tensor, "n e vocab"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        self.check(logits.shape[-1], index)
        return self.read(_of_tokens(logits, self.tokens[index]), index)


@dataclass(frozen=True)
class WholeMeasure:
    """A function of all logits, with the right token of each example."""

    function: Measure
    answer: Int[Tensor, "n"]

    def __call__(self, logits: Float[Tensor, "n e vocab"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        return self.function(logits, index)


@dataclass(frozen=True)
class LogitSum:
    """A weighted sum of logits whose weights add up to 0, which is that of the log-probabilities.

    Attributes:
        tokens: which tokens, for each example.
        weights: of their logits; 0 for tokens that fill up.
        answer: the right token, -1 where none is.
    """

    tokens: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]
    answer: Int[Tensor, "n"]

    def read(self, logits: Float[Tensor, "n e k"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        return (logits * self.weights[index].to(logits)[:, None]).sum(-1)

    def __call__(self, logits: Float[Tensor, "n e vocab"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        return self.read(_of_tokens(logits, self.tokens[index]), index)


@dataclass(frozen=True)
class LogProbabilitySum:
    """A weighted sum of log-probabilities, whatever the weights.

    Attributes:
        scored: which tokens, for each example; the logits of all are read.
        weights, answer: as `LogitSum`.
    """

    scored: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]
    answer: Int[Tensor, "n"]

    def __call__(self, logits: Float[Tensor, "n e vocab"], index: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        weights = self.weights[index].to(logits)[:, None]
        of_tokens = (_of_tokens(logits, self.scored[index]) * weights).sum(-1)
        return of_tokens - weights.sum(-1) * logits.logsumexp(-1)


def correct(predictions: Int[Tensor, "n"], measure: Measure) -> Bool[Tensor, "n"]:
    """Where the most probable token is the right one.

    Raises:
        Invalid: the measure does not say which is.
    """
    answer = getattr(measure, "answer", None)
    if answer is None:
        raise Invalid(f"the measure {measure} has no attribute 'answer': must say which token is right to count those")
    return predictions == answer.to(predictions.device)


def _of_tokens(logits: Float[Tensor, "n e vocab"], tokens: Int[Tensor, "n k"]) -> Float[Tensor, "n e k"]:
    return logits.gather(-1, tokens.to(logits.device)[:, None].expand(-1, logits.shape[1], -1))
