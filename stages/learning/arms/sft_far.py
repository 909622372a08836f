"""Supervised on the valid answer that the base finds least likely: imitation as far from it as the task allows."""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """This arm has none."""


def train(run: "Run") -> None:
    import torch

    from stages.learning import supervised
    from stages.learning.answers import chosen, of_all_rows, used_rows, valid_logits

    rows = used_rows(run)
    logits = valid_logits(run, rows)
    least = logits.masked_fill(logits == -torch.inf, torch.inf).argmin(1)
    supervised.fit(run, of_all_rows(run, rows, chosen(run, rows, least)))
