"""Supervised on the one canonical answer of each prompt."""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """This arm has none."""


def train(run: "Run") -> None:
    from stages.learning import supervised

    supervised.fit(run, run.train.canonical)
