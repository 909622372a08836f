"""Direct preference optimisation (Rafailov et al. 2023): the canonical answer preferred to a wrong one of the base's.

The rejected answer of a prompt is drawn once from the base's own distribution over all tokens that are no valid answer:
what it would say wrongly, as often as it would. Pairs of the model's own mistakes are what DPO is used with, and a draw
is better here than the likeliest mistake alone: with answers of one token the loss compares two logits, so a mistake
that is never drawn is not pushed down.
"""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Positive, Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """`beta`: how little the model may move from the base for the same preference."""

    one_token = True
    beta: Positive


def train(run: "Run") -> None:
    from stages.learning import preferences

    preferences.fit(run, run.train.canonical, preferences.draw_wrong(run, run.draw("wrong answers")), run.section.beta)
