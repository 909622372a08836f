"""Supervised on the valid answer that the base finds least likely: imitation as far from it as the task allows."""

import torch

from stages.learning import supervised
from stages.learning.answers import chosen, of_all_rows, used_rows, valid_logits
from stages.learning.run import Run


def train(run: Run) -> None:
    rows = used_rows(run)
    logits = valid_logits(run, rows)
    least = logits.masked_fill(logits == -torch.inf, torch.inf).argmin(1)
    supervised.fit(run, of_all_rows(run, rows, chosen(run, rows, least)))
