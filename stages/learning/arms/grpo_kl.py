"""`grpo` with a penalty on the divergence from the base (`beta` above 0)."""

from stages.learning import reinforcement
from stages.learning.rewards import validity
from stages.learning.run import Run


def train(run: Run) -> None:
    reinforcement.fit(
        run,
        validity(run.train.valid),
        baseline=True,
        samples_per_prompt=run.section.samples_per_prompt,
        temperature=run.section.temperature,
        beta=run.section.beta,
    )
