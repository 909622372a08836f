"""`grpo` with a penalty on the divergence from the base (`beta` above 0)."""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import NotNegative, Sampling

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Sampling):
    """`beta` is the weight of the divergence from the base."""

    beta: NotNegative


def train(run: "Run") -> None:
    from stages.learning import reinforcement
    from stages.learning.rewards import validity

    reinforcement.fit(
        run,
        validity(run.train.valid),
        baseline=True,
        samples_per_prompt=run.section.samples_per_prompt,
        temperature=run.section.temperature,
        beta=run.section.beta,
    )
