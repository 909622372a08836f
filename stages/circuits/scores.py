"""What a patched run is measured by, and how effects become scores with their noise."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.readout import Measure, TokenMeasure, WholeMeasure
from stages.pipeline.stage import Invalid

if TYPE_CHECKING:
    import pandas as pd


class Metric(StrEnum):
    """How strongly a patch moves the answer."""

    LOGIT_DIFFERENCE = "logit_difference"
    """(d_patched - d_clean) / (d_corrupt - d_clean), a ratio of means; 1 = fully corrupt. d = logit of the
    right object minus the mean logit of the other objects of the context."""

    RELATIVE_PROBABILITY = "relative_probability"
    """Mean of (p_patched - p_clean) / p_clean, p = probability of the right object (Prakash et al. 2024);
    more negative = more important. It vanishes where the model is nearly certain."""

    @property
    def towards_corrupt(self) -> int:
        """Sign of a score that means towards the corrupt run."""
        return 1 if self == Metric.LOGIT_DIFFERENCE else -1


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

    def __getitem__(self, number: int) -> "Scores":
        """Those of one entry of the first axis."""
        return Scores(self.score[number], self.noise[number], self.strength[number])

    def strongest(self, k: int) -> list[tuple[tuple[int, ...], float]]:
        """The k senders with the largest scores, whatever their sign: ((layer, head), score), strongest first; ties in
        the order of layers and heads."""
        order = torch.argsort(self.score.abs().flatten(), descending=True, stable=True)[:k]
        at = torch.unravel_index(order, self.score.shape)
        return [(tuple(map(int, sender)), float(self.score[sender])) for sender in zip(*at, strict=True)]

    def frame(self) -> "pd.DataFrame":
        """One row a sender: layer, head, score, noise.

        Raises:
            Invalid: the senders are not single heads of all layers.
        """
        if self.score.ndim != 2:
            raise Invalid(f"scores have shape {list(self.score.shape)}: must be layers by heads for a table of heads")
        import pandas as pd  # here, since nothing else of the engine needs it

        layers, heads = self.score.shape
        return pd.DataFrame(
            {
                "layer": np.repeat(np.arange(layers), heads),
                "head": np.tile(np.arange(heads), layers),
                "score": self.score.flatten().numpy(),
                "noise": self.noise.flatten().numpy(),
            }
        )

    @staticmethod
    def of(metric: Metric, value: Float[Tensor, "*senders"], noise: Float[Tensor, "*senders"]) -> "Scores":
        """Scores and their noise as they stand, in the unit of a metric."""
        return Scores(value, noise, metric.towards_corrupt * value)


def logit_difference(
    logits: Float[Tensor, "n *e vocab"], answer: Int[Tensor, "n"], others: Int[Tensor, "n k"]
) -> Float[Tensor, "n *e"]:
    """d: logit of the answer minus the mean logit of the others."""
    shape = (len(answer), *[1] * (logits.ndim - 2), -1)
    spread = (*logits.shape[:-1], -1)
    right = logits.gather(-1, answer.view(shape).expand(spread))[..., 0]
    return right - logits.gather(-1, others.view(shape).expand(spread)).mean(-1)


def measure_of(metric: Metric, answer: Int[Tensor, "n"], others: Int[Tensor, "n k"]) -> Measure:
    """The function of patched logits that a metric is computed from.

    Raises:
        Invalid: there is not one answer a prompt with at least one other; the function itself when a label is not a
            token of the model's vocabulary, or there are fewer answers than prompts.
    """
    n = len(answer)
    if n == 0 or len(others) != n or others.shape[1] == 0:
        raise Invalid(
            f"answer has shape {list(answer.shape)}, others {list(others.shape)}: must be one token id a prompt, and "
            "at least one other a prompt"
        )
    low, high = int(min(answer.min(), others.min())), int(max(answer.max(), others.max()))

    def check(vocab: int, index: Tensor) -> None:
        if low < 0 or high >= vocab:
            raise Invalid(
                f"answer or others hold token id {low if low < 0 else high}: every label must be one token of the "
                f"vocabulary, from 0 to {vocab - 1}"
            )
        if int(index.max()) >= n:
            raise Invalid(f"{n} answers, but a prompt with index {int(index.max())}: must be one answer a prompt")

    if metric == Metric.LOGIT_DIFFERENCE:
        tokens = torch.cat([answer[:, None], others], dim=1)
        return TokenMeasure(tokens, lambda logits: logits[..., 0] - logits[..., 1:].mean(-1), check, answer)

    def probability(logits: Tensor, index: Tensor) -> Tensor:
        check(logits.shape[-1], index)
        at = answer[index].to(logits.device)[:, None, None].expand(-1, logits.shape[1], 1)
        return (logits.gather(-1, at)[..., 0] - logits.logsumexp(-1)).exp()

    return WholeMeasure(probability, answer)


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

    Raises:
        Invalid: there are fewer than two examples, or a score is not a finite number.
    """
    n = len(clean)
    if n < 2:
        raise Invalid(f"scores of {n} example: must be at least 2, for their noise")
    if metric == Metric.LOGIT_DIFFERENCE:
        full = corrupt - clean
        if float(full.mean()) == 0:
            raise Invalid("clean and corrupt runs have the same mean logit difference: scores are shares of the change")
        value = effects.mean(-1) / full.mean()
        deviation = (effects - value[..., None] * full) / full.mean()
    else:
        relative = effects / clean.clamp_min(torch.finfo(clean.dtype).tiny)
        value = relative.mean(-1)
        deviation = relative - value[..., None]
    if not bool(torch.isfinite(value).all()):
        which = ".".join(map(str, (~torch.isfinite(value)).nonzero()[0].tolist()))
        raise Invalid(f"the {metric} score{f' of sender {which}' if which else ''} is not a finite number")
    noise = deviation.square().sum(-1).div(n * (n - 1)).sqrt()
    return Scores.of(metric, value, noise)


def half_scores(
    metric: Metric,
    effects: Float[Tensor, "*senders n"],
    clean: Float[Tensor, "n"],
    corrupt: Float[Tensor, "n"],
) -> Float[Tensor, "2 *senders"]:
    """Scores from the even examples alone, and from the odd ones.

    Raises:
        Invalid: a half has fewer than two examples.
    """
    return torch.stack(
        [score(metric, effects[..., half::2], clean[half::2], corrupt[half::2]).score for half in (0, 1)]
    )


def split_half(halves: Float[Tensor, "2 layers h"]) -> float | None:
    """Pearson correlation between the scores of two halves of the examples, over heads that are not exactly 0.

    Returns:
        None when fewer than three heads have an effect.
    """
    live = (halves != 0).any(0)
    if int(live.sum()) < 3:
        return None
    return float(torch.corrcoef(halves[:, live].double())[0, 1])
