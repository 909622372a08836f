"""Supervised on the model's own valid answers, drawn anew every few steps: between `self_sft` and `reinforce`.

Before step 1, 1 + k, 1 + 2 k, ... (k = `every`) the answers of the next k steps are drawn from the model as it is then,
restricted to the valid ones. With k = 1 it is on-policy, with k = the number of steps it is `self_sft`.
"""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Count, Positive, Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """`temperature` of the draws, and `every` so many steps a draw."""

    one_token = True
    temperature: Positive
    every: Count


def train(run: "Run") -> None:
    from stages.learning.own_answers import fit

    fit(run)
