"""`grpo` with a reward that has nothing to do with the answer: what policy-gradient steps do that teach nothing."""

import torch

from stages.learning import reinforcement
from stages.learning.run import Run


def train(run: Run) -> None:
    generator = run.draw("rewards")

    def coin(prompts: list[str], **_: object) -> list[float | None]:
        heads = torch.rand(len(prompts), generator=generator) < run.section.probability
        return [float(won) for won in heads]

    reinforcement.fit(
        run,
        coin,
        baseline=True,
        samples_per_prompt=run.section.samples_per_prompt,
        temperature=run.section.temperature,
    )
