"""Which valid answers supervised arms are taught: the likeliest, least likely or drawn ones of some model."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.learning.probes import last_logits
from stages.learning.run import Run


def used_rows(run: Run) -> Int[Tensor, " n"]:
    """The rows of `run.train` that the run uses, in increasing order."""
    return torch.from_numpy(run.order).unique()


def draw_valid(run: Run, rows: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, " n"]:
    """A valid answer for each row, drawn from `run.model` as it is now, at the temperature of the arm.

    Rejecting samples until one is valid is the same as drawing from the model's distribution restricted to the valid
    answers, which is what happens here; no prompt is lost for lack of a valid sample.
    """
    of_valid = valid_logits(run, rows) / run.section.temperature
    choice = torch.multinomial(of_valid.softmax(-1), 1, generator=generator)
    return run.train.valid[rows].gather(1, choice)[:, 0]


def valid_logits(run: Run, rows: Int[Tensor, " n"]) -> Float[Tensor, "n v"]:
    """Logits of each row's valid answers by `run.model` as it is now; minus infinity where there are fewer than v."""
    valid, training = run.train.valid[rows], run.model.training
    logits = last_logits(run.model.eval(), run.train.input_ids[rows])
    run.model.train(training)
    return logits.gather(1, valid.clamp(min=0)).masked_fill(valid < 0, -torch.inf)


def of_all_rows(run: Run, rows: Int[Tensor, " n"], answers: Int[Tensor, " n"]) -> Int[Tensor, " rows"]:
    """Answers of some rows of `run.train` as answers of all; -1 elsewhere."""
    found = torch.full((len(run.train.input_ids),), -1)
    found[rows] = answers
    return found
