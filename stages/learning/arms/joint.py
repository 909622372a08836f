"""Both tasks at once: `sft_gold` with as many old-task prompts in each step as new ones. The ceiling."""

import torch

from stages.learning import supervised
from stages.learning.run import Run


def train(run: Run) -> None:
    rows = torch.randint(len(run.rehearsal), run.order.shape, generator=run.draw("old task"))
    supervised.fit(run, run.train.canonical, run.rehearsal.input_ids[rows], run.rehearsal.canonical[rows])
