"""Policy gradient on the model's own samples with reward 1 or 0 and no baseline: only valid samples teach."""

from typing import TYPE_CHECKING

from stages.learning.policy_gradient import Loss, PolicyGradient

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(PolicyGradient):
    """No `scale_rewards`, as nothing is subtracted."""

    loss_type: Loss


def train(run: "Run") -> None:
    from stages.learning import reinforcement
    from stages.learning.rewards import validity

    reinforcement.fit(run, validity(run.train.valid), baseline=False)
