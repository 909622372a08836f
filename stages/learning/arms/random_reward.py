"""`grpo` with a reward that has nothing to do with the answer: what policy-gradient steps do that teach nothing."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.pipeline.params.fields import Sampling

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Sampling):
    """`probability` of a reward."""

    probability: Annotated[float, Field(gt=0, lt=1)]


def train(run: "Run") -> None:
    import torch

    from stages.learning import reinforcement

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
