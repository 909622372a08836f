"""Both tasks at once: `sft_gold` with as many old-task prompts in each step as new ones. The ceiling."""

import torch

from stages.learning import supervised
from stages.learning.replay import as_old_task
from stages.learning.run import Run


def train(run: Run) -> None:
    rows = torch.randint(len(run.train.input_ids), run.order.shape, generator=run.draw("old task"))
    relation = run.tokenizer.get_vocab()[run.section.relation]
    prompts = run.train.input_ids[rows.flatten()]
    ids, answers = as_old_task(prompts, run.train.objects[rows.flatten()], relation)
    supervised.fit(run, run.train.canonical, ids.view(*rows.shape, -1), answers.view(rows.shape))
