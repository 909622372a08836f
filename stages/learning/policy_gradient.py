"""What arms that learn from rewards share: their settings, with the names and values of TRL's GRPOConfig.

Imports nothing heavy, as arms are imported whenever params are read.

| arm | advantage of a sample |
| --- | --- |
| `reinforce` | its reward |
| `rloo` | minus the mean reward of the other samples of its prompt |
| `dr_grpo`, `dr_grpo_kl` | minus the mean reward of all samples of its prompt |
| `grpo` | the same, divided by the standard deviation of these rewards |
"""

from typing import TYPE_CHECKING, Literal

from stages.pipeline.params.fields import Count, NotNegative, Positive, Sampling

if TYPE_CHECKING:
    from stages.learning.run import Run

# What the summed losses of the tokens are divided by, where all are one for answers of one token. grpo: each answer's
# by its own length, their sum by the number of answers; dr_grpo: by that number times the length of the longest answer
# there is; bnpo and dapo: by the number of tokens of the batch, which is one here, so that the two are the same.
Loss = Literal["grpo", "dr_grpo", "bnpo", "dapo"]
# GRPOConfig has further ones (cispo, sapo, luspo, vespo), to which epsilon is another thing or nothing.


class PolicyGradient(Sampling):
    """Those of all these arms; each says its `loss_type`, and its `scale_rewards` if it has a choice of it.

    `num_iterations`: gradient steps that learn in turn from the same samples; with 1 every step is on-policy.
    `epsilon`: the ratio of a token's probability to that when it was drawn is clipped to 1 - epsilon, 1 + epsilon; it
    is 1 in the first of these steps.
    """

    num_iterations: Count
    epsilon: Positive


class DrGRPO(PolicyGradient):
    """Dr. GRPO: no division by the standard deviation of rewards, nor of an answer's loss by its own length.

    `beta` is the weight of KL(policy || base).
    """

    # Draws as `grpo` does, so that the two see the same samples as long as they are one model.
    stream = "grpo"
    loss_type: Literal["dr_grpo", "bnpo", "dapo"]
    scale_rewards: Literal["none"]
    beta: NotNegative


def learn_from_validity(run: "Run") -> None:
    """Policy gradient with reward 1 for a valid answer and 0 for another, the mean reward of a prompt as baseline."""
    from stages.learning import reinforcement
    from stages.learning.rewards import validity

    reinforcement.fit(run, validity(run.train.valid))
