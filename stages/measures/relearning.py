"""How soon the old task comes back: gradient steps on a few old examples until most of the base's accuracy is back.

If it takes few steps, its mechanism was covered up rather than taken away. The comparison is with the first time:
savings = (steps at first - steps again) / steps at first (Ebbinghaus 1885; for networks Hinton and Plaut 1987). The
first time is the base's own curriculum, which a fresh model needs: on a few examples alone, in so few steps, it learns
nothing.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from stages.learning.probes import last_logits
from stages.measures.readout import Readout
from stages.tasks.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Relearning:
    """What happened.

    Attributes:
        target: accuracy that counts as relearned.
        accuracies: before any step, and after each.
        steps: the first number of steps at the target; None if it was not reached.
        before, after: the four scores before any step, and after the last one.
    """

    target: float
    accuracies: list[float]
    steps: int | None
    before: dict[str, float]
    after: dict[str, float]


def whole_scores(model: "PreTrainedModel", examples: Examples) -> dict[str, float]:
    """The four `scores` of a whole model."""
    logits = last_logits(model, examples.input_ids)
    return Readout.of(logits[:, None], examples.answer, examples.others).means()[0]


def relearn(
    model: "PreTrainedModel",
    examples: Examples,
    probe: Examples,
    target: float,
    most_steps: int,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> Relearning:
    """Train a copy of the model by cross-entropy on the answers, all examples a step, until the target is reached.

    Args:
        model: stays as it is.
        examples: what it learns from.
        probe: other examples, which decide.
        target: accuracy on the probe.
        most_steps: where to stop.
        learning_rate, betas, weight_decay: of AdamW.
    """
    found = [whole_scores(model, probe)]

    def relearning(steps: int | None) -> Relearning:
        return Relearning(target, [scores["accuracy"] for scores in found], steps, found[0], found[-1])

    if found[0]["accuracy"] >= target:
        return relearning(0)
    learner = copy.deepcopy(model).eval()  # without dropout
    optimiser = torch.optim.AdamW(learner.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    for step in range(1, most_steps + 1):
        optimiser.zero_grad()
        for rows in torch.arange(len(examples)).split(32):  # more at once fall out of the processor's cache
            part = examples.select(rows)
            ids, answer = (x.to(learner.device) for x in (part.input_ids, part.answer))
            logits = learner(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1]
            (functional.cross_entropy(logits, answer, reduction="sum") / len(examples)).backward()
        optimiser.step()
        found.append(whole_scores(learner, probe))
        if found[-1]["accuracy"] >= target:
            return relearning(step)
    return relearning(None)
