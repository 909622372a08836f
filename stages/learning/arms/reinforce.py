"""Policy gradient on the model's own samples with reward 1 or 0 and no baseline: only valid samples teach."""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Sampling

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Sampling):
    """Those of its samples."""


def train(run: "Run") -> None:
    from stages.learning import reinforcement
    from stages.learning.rewards import validity

    reinforcement.fit(
        run,
        validity(run.train.valid),
        baseline=False,
        samples_per_prompt=run.section.samples_per_prompt,
        temperature=run.section.temperature,
    )
