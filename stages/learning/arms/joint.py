"""Both tasks at once: `sft_gold` with as many old-task prompts in each step as new ones. The ceiling."""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """This arm has none."""


def train(run: "Run") -> None:
    import torch

    from stages.learning import supervised

    rows = torch.randint(len(run.rehearsal), run.order.shape, generator=run.draw("old task"))
    supervised.fit(run, run.train.canonical, run.rehearsal.input_ids[rows], run.rehearsal.canonical[rows])
