"""`sft_gold` with a few old-task examples in each step: the control that must preserve the old task."""

import torch

from stages.learning import supervised
from stages.learning.run import Run


def train(run: Run) -> None:
    steps, prompts = run.order.shape
    extra = max(1, round(run.section.fraction * prompts))  # on top of the new-task prompts, whose number is kept
    rows = torch.randint(len(run.rehearsal), (steps, extra), generator=run.draw("replay"))
    supervised.fit(run, run.train.canonical, run.rehearsal.input_ids[rows], run.rehearsal.canonical[rows])
