"""Supervised on the answers that `dr_grpo` samples and that are valid, in the steps in which it samples them.

With the answers and their spread equal, what differs from `dr_grpo` is the gradient. It costs the training of both.
"""

from typing import TYPE_CHECKING

from stages.learning.policy_gradient import DrGRPO
from stages.pipeline.params.fields import Sampling

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Sampling):
    """How `dr_grpo` samples."""

    one_token = True
    stream = DrGRPO.stream


def train(run: "Run") -> None:
    from stages.learning import accepted

    policy = DrGRPO(
        samples_per_prompt=run.section.samples_per_prompt,
        temperature=run.section.temperature,
        loss_type="dr_grpo",
        scale_rewards="none",
        num_iterations=1,
        epsilon=0.2,
        beta=0.0,
    )
    accepted.fit(run, policy)
