"""`dr_grpo` with advantages divided by the standard deviation of a prompt's rewards (GRPO; Shao et al. 2024).

The division gives a prompt that the model nearly always, or nearly never, answers rightly as much weight as any other.
"""

from typing import Literal

from stages.learning.policy_gradient import Loss, PolicyGradient
from stages.learning.policy_gradient import learn_from_validity as train
from stages.pipeline.params.fields import NotNegative

__all__ = ["Settings", "train"]


class Settings(PolicyGradient):
    """`scale_rewards`: whose standard deviation divides, the prompt's (group) or that of all samples of the step
    (batch). `beta` is the weight of KL(policy || base).
    """

    loss_type: Loss
    scale_rewards: Literal["group", "batch"]
    beta: NotNegative
