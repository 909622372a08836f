"""`sft_gold` with a few old-task examples in each step: the control that must preserve the old task."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.pipeline.params.fields import Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """`fraction` is the number of old-task prompts on top of each new-task one."""

    fraction: Annotated[float, Field(gt=0, le=1)]


def train(run: "Run") -> None:
    import torch

    from stages.learning import supervised

    steps, prompts = run.order.shape
    extra = max(1, round(run.section.fraction * prompts))  # on top of the new-task prompts, whose number is kept
    rows = torch.randint(len(run.rehearsal), (steps, extra), generator=run.draw("replay"))
    supervised.fit(run, run.train.canonical, run.rehearsal.input_ids[rows], run.rehearsal.canonical[rows])
