"""Supervised on the base's own valid answers: drawn once, by rejection, and kept fixed.

Where a prompt has one right answer, that is what is drawn, and the arm is `sft_gold`.
"""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Positive, Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """`temperature` of the draws."""

    temperature: Positive


def train(run: "Run") -> None:
    from stages.learning import supervised
    from stages.learning.answers import draw_valid, of_all_rows, used_rows

    rows = used_rows(run)
    supervised.fit(run, of_all_rows(run, rows, draw_valid(run, rows, run.draw("answers"))))
