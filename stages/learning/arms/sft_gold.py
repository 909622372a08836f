"""Supervised on the one canonical answer of each prompt."""

from stages.learning import supervised
from stages.learning.run import Run


def train(run: Run) -> None:
    supervised.fit(run, run.train.canonical)
