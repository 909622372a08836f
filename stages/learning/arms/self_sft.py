"""Supervised on the base's own valid answers: drawn once, by rejection, and kept fixed.

Rejecting samples until one is valid is the same as drawing from the base's distribution restricted to the
valid answers, which is what happens here; no prompt is lost for lack of a valid sample.
"""

import torch

from stages.learning import supervised
from stages.learning.probes import last_logits
from stages.learning.run import Run


def train(run: Run) -> None:
    used = torch.from_numpy(run.order).unique()
    valid = run.train.valid[used]
    logits = last_logits(run.model, run.train.input_ids[used]) / run.section.temperature
    of_valid = logits.gather(1, valid.clamp(min=0)).masked_fill(valid < 0, -torch.inf)
    choice = torch.multinomial(of_valid.softmax(-1), 1, generator=run.draw("answers"))
    answers = torch.full((len(run.train.input_ids),), -1)
    answers[used] = valid.gather(1, choice)[:, 0]
    supervised.fit(run, answers)
