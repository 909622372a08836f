"""REINFORCE with the mean reward of a prompt's *other* samples as baseline (RLOO; Ahmadian et al. 2024).

The advantage is k / (k - 1) times that of `dr_grpo`, with k samples a prompt, which is the same direction: an optimiser
that divides by the size of past gradients makes little of the factor. It is TRL's RLOO with the one-pass sampling of
`reinforcement`, which TRL's RLOOTrainer has no hook for.
"""

from typing import TYPE_CHECKING

from stages.learning.policy_gradient import Loss, PolicyGradient

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(PolicyGradient):
    """No `scale_rewards`: divided by a standard deviation, the factor would be gone, and it would be `grpo`."""

    loss_type: Loss


def train(run: "Run") -> None:
    from stages.learning import reinforcement
    from stages.learning.rewards import validity

    samples = run.section.samples_per_prompt
    valid = validity(run.train.valid)

    def scaled(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float | None]:
        # r - mean of the others = k / (k - 1) (r - mean of all), so the factor may as well be in the reward
        rewards = valid(prompts=prompts, completion_ids=completion_ids)
        return [None if reward is None else reward * samples / (samples - 1) for reward in rewards]

    reinforcement.fit(run, scaled)
