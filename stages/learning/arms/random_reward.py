"""`dr_grpo` with a reward that has nothing to do with the answer: what policy-gradient steps do that teach nothing."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.learning.policy_gradient import Loss, PolicyGradient

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(PolicyGradient):
    """`probability` of a reward; advantages are divided by no standard deviation (`scale_rewards` none), or by that of
    a prompt's rewards (group) or of all of the step (batch), as in the arm that it is to be compared with.
    """

    loss_type: Loss
    scale_rewards: Literal["none", "group", "batch"]
    probability: Annotated[float, Field(gt=0, lt=1)]


def train(run: "Run") -> None:
    import torch

    from stages.learning import reinforcement

    generator = run.draw("rewards")

    def coin(prompts: list[str], **_: object) -> list[float | None]:
        heads = torch.rand(len(prompts), generator=generator) < run.section.probability
        return [float(won) for won in heads]

    reinforcement.fit(run, coin)
