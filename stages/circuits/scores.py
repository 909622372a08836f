"""What a patched run is measured by, and how effects become scores with their noise."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.path_patching import Measure, TokenMeasure


class Metric(StrEnum):
    """How strongly a patch moves the answer."""

    LOGIT_DIFFERENCE = "logit_difference"
    """(d_patched - d_clean) / (d_corrupt - d_clean), a ratio of means; 1 = fully corrupt. d = logit of the
    right object minus the mean logit of the other objects of the context."""

    RELATIVE_PROBABILITY = "relative_probability"
    """Mean of (p_patched - p_clean) / p_clean, p = probability of the right object (Prakash et al. 2024);
    more negative = more important. It vanishes where the model is nearly certain."""


@dataclass(frozen=True)
class Scores:
    """Scores of senders with their standard errors over examples.

    Attributes:
        score: in the unit of the metric.
        noise: its standard error, same unit.
        strength: the score with its sign turned so that positive means towards the corrupt run.
    """

    score: Float[Tensor, "*senders"]
    noise: Float[Tensor, "*senders"]
    strength: Float[Tensor, "*senders"]


def logit_difference(
    logits: Float[Tensor, "n *e vocab"], answer: Int[Tensor, "n"], others: Int[Tensor, "n k"]
) -> Float[Tensor, "n *e"]:
    """d: logit of the answer minus the mean logit of the others."""
    shape = (len(answer), *[1] * (logits.ndim - 2), -1)
    spread = (*logits.shape[:-1], -1)
    right = logits.gather(-1, answer.view(shape).expand(spread))[..., 0]
    return right - logits.gather(-1, others.view(shape).expand(spread)).mean(-1)


def measure_of(metric: Metric, answer: Int[Tensor, "n"], others: Int[Tensor, "n k"]) -> Measure:
    """The function of patched logits that a metric is computed from."""

    if metric == Metric.LOGIT_DIFFERENCE:
        tokens = torch.cat([answer[:, None], others], dim=1)
        return TokenMeasure(tokens, lambda logits: logits[..., 0] - logits[..., 1:].mean(-1))

    def probability(logits: Tensor, index: Tensor) -> Tensor:
        at = answer[index].to(logits.device)[:, None, None].expand(-1, logits.shape[1], 1)
        return (logits.gather(-1, at)[..., 0] - logits.logsumexp(-1)).exp()

    return probability


def score(
    metric: Metric,
    effects: Float[Tensor, "*senders n"],
    clean: Float[Tensor, "n"],
    corrupt: Float[Tensor, "n"],
) -> Scores:
    """Scores from per-example effects.

    Args:
        effects: measure(patched) - measure(clean).
        clean: the measure on the clean runs.
        corrupt: the measure on the corrupt runs.

    Returns:
        scores; the noise of a ratio of means is its delta-method standard error.
    """
    n = len(clean)
    if metric == Metric.LOGIT_DIFFERENCE:
        full = corrupt - clean
        value = effects.mean(-1) / full.mean()
        deviation = (effects - value[..., None] * full) / full.mean()
        sign = 1
    else:
        relative = effects / clean.clamp_min(torch.finfo(clean.dtype).tiny)
        value = relative.mean(-1)
        deviation = relative - value[..., None]
        sign = -1
    noise = deviation.square().sum(-1).div(n * (n - 1)).sqrt()
    return Scores(value, noise, sign * value)


def split_half(
    metric: Metric,
    effects: Float[Tensor, "layers h n"],
    clean: Float[Tensor, "n"],
    corrupt: Float[Tensor, "n"],
) -> float | None:
    """Pearson correlation between the scores of even and odd examples, over heads that are not exactly 0.

    Returns:
        None when fewer than three heads have an effect.
    """
    live = effects.abs().sum(-1) > 0
    if int(live.sum()) < 3:
        return None
    halves = [score(metric, effects[live][:, half::2], clean[half::2], corrupt[half::2]).score for half in (0, 1)]
    return float(torch.corrcoef(torch.stack(halves).double())[0, 1])
