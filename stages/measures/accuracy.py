"""How well a model answers: scores of the logits at the last token, over the whole vocabulary."""

from jaxtyping import Bool, Float, Int
from torch import Tensor


def correct(logits: Float[Tensor, "n vocab"], answer: Int[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Whether the most likely token of the whole vocabulary is the answer."""
    return logits.argmax(-1) == answer


def correct_among(logits: Float[Tensor, "n vocab"], valid: Int[Tensor, "n v"]) -> Bool[Tensor, "n"]:
    """Whether the most likely token of the whole vocabulary is one of the valid answers (padded with -1)."""
    return (logits.argmax(-1, keepdim=True) == valid).any(-1)


def p_correct(logits: Float[Tensor, "n vocab"], answer: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Probability of the answer."""
    return logits.double().softmax(-1).gather(1, answer[:, None])[:, 0]


def valid_mass(logits: Float[Tensor, "n vocab"], valid: Int[Tensor, "n v"]) -> Float[Tensor, "n"]:
    """Probability of all valid answers (padded with -1) together."""
    return (logits.double().softmax(-1).gather(1, valid.clamp(min=0)) * (valid >= 0)).sum(-1)


def logit_difference(
    logits: Float[Tensor, "n vocab"], answer: Int[Tensor, "n"], others: Int[Tensor, "n k"]
) -> Float[Tensor, "n"]:
    """Logit of the answer minus the mean logit of the other objects of the context."""
    values = logits.double()
    return values.gather(1, answer[:, None])[:, 0] - values.gather(1, others).mean(-1)


def flips(before: Bool[Tensor, "n"], after: Bool[Tensor, "n"]) -> dict[str, float]:
    """Shares of all examples that went from right to wrong ("lost") and from wrong to right ("gained")."""
    return {
        "lost": (before & ~after).double().mean().item(),
        "gained": (~before & after).double().mean().item(),
    }
