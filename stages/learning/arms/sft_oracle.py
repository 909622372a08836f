"""Supervised on the base's own distribution over the valid answers: the nearest target that solves the task.

Of all distributions without an invalid answer, q(y) = p(y) [y valid] / p(valid), with p the base, is the one nearest
to the base in KL(q || p). `self_sft` draws one answer of it for each prompt; here the loss is the cross-entropy with q
itself, as from infinitely many draws.
"""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """This arm has none."""

    one_token = True


def train(run: "Run") -> None:
    from stages.learning import supervised
    from stages.learning.answers import shares_of_valid, used_rows

    supervised.refuse_several_tokens(run)
    shares = shares_of_valid(run, used_rows(run))
    supervised.fit_soft(run, run.train.valid.clamp(min=0), shares)
