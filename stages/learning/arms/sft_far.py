"""Supervised on the valid answer that the base finds least likely: imitation as far from it as the task allows."""

import torch

from stages.learning import supervised
from stages.learning.probes import last_logits
from stages.learning.run import Run


def train(run: Run) -> None:
    used = torch.from_numpy(run.order).unique()
    valid = run.train.valid[used]
    logits = last_logits(run.model, run.train.input_ids[used])
    of_valid = logits.gather(1, valid.clamp(min=0)).masked_fill(valid < 0, torch.inf)
    answers = torch.full((len(run.train.input_ids),), -1)
    answers[used] = valid.gather(1, of_valid.argmin(1, keepdim=True))[:, 0]
    supervised.fit(run, answers)
