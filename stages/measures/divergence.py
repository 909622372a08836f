"""How far apart two models' answers are: exact over the vocabulary, in float64, in nats."""

import torch
from jaxtyping import Float
from torch import Tensor


def kl(p_logits: Float[Tensor, "n vocab"], q_logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    """KL(p || q) of the two softmax distributions, for each example."""
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def total_variation(p_logits: Float[Tensor, "n vocab"], q_logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    """Total variation distance, half the summed absolute difference: 0 (equal) to 1 (disjoint)."""
    return (p_logits.double().softmax(-1) - q_logits.double().softmax(-1)).abs().sum(-1) / 2


def divergences(
    base: Float[Tensor, "places vocab"], tuned: Float[Tensor, "places vocab"], examples: int | None = None
) -> dict[str, float]:
    """Means over examples: kl = KL(base || tuned), reverse_kl = KL(tuned || base), tv.

    Args:
        base, tuned: logits at the places of all examples.
        examples: how many there are, if they have several places each: divergences are summed over an example's places,
            given what stands before each, and `tv` is averaged.
    """
    places = 1.0 if examples is None else len(base) / examples
    return {
        "kl": kl(base, tuned).mean().item() * places,
        "reverse_kl": kl(tuned, base).mean().item() * places,
        "tv": torch.mean(total_variation(base, tuned)).item(),
    }
