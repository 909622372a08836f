"""`sft_gold` with a few old-task examples in each step: the control that must preserve the old task."""

import torch

from stages.learning import supervised
from stages.learning.replay import as_old_task
from stages.learning.run import Run


def train(run: Run) -> None:
    steps, prompts = run.order.shape
    extra = max(1, round(run.section.fraction * prompts))  # on top of the new-task prompts, whose number is kept
    rows = torch.randint(len(run.train.input_ids), (steps * extra,), generator=run.draw("replay"))
    relation = run.tokenizer.get_vocab()[run.section.relation]
    ids, answers = as_old_task(run.train.input_ids[rows], run.train.objects[rows], relation)
    supervised.fit(run, run.train.canonical, ids.view(steps, extra, -1), answers.view(steps, extra))
