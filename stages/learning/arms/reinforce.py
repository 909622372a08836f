"""Policy gradient on the model's own samples with reward 1 or 0 and no baseline: only valid samples teach."""

from stages.learning import reinforcement
from stages.learning.rewards import validity
from stages.learning.run import Run


def train(run: Run) -> None:
    reinforcement.fit(
        run,
        validity(run.train.valid),
        baseline=False,
        samples_per_prompt=run.section.samples_per_prompt,
        temperature=run.section.temperature,
    )
