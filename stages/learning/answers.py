"""Which valid answers supervised arms are taught: the likeliest, least likely or drawn ones of some model."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.learning.probes import last_logits, score_answers
from stages.learning.run import Run


def used_rows(run: Run) -> Int[Tensor, " n"]:
    """The rows of `run.train` that the run uses, in increasing order."""
    return torch.from_numpy(run.order).unique()


def draw_valid(run: Run, rows: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, "n *length"]:
    """A valid answer for each row, drawn from `run.model` as it is now, at the temperature of the arm.

    Rejecting samples until one is valid is the same as drawing from the model's distribution restricted to the valid
    answers, which is what happens here; no prompt is lost for lack of a valid sample. The temperature is that of
    answers as a whole.
    """
    of_valid = valid_logits(run, rows) / run.section.temperature
    return chosen(run, rows, torch.multinomial(of_valid.softmax(-1), 1, generator=generator)[:, 0])


def valid_logits(run: Run, rows: Int[Tensor, " n"]) -> Float[Tensor, "n v"]:
    """Logits of each row's valid answers by `run.model` as it is now, or log-probabilities of those of several tokens;
    minus infinity where there are fewer than v."""
    prompts, training = run.train.select(rows), run.model.training
    run.model.eval()
    if prompts.several_tokens:
        found = score_answers(run.model, prompts).log_probs.float()
    else:
        logits = last_logits(run.model, prompts.input_ids)
        found = logits.gather(1, prompts.valid.clamp(min=0)).masked_fill(prompts.valid < 0, -torch.inf)
    run.model.train(training)
    return found


def chosen(run: Run, rows: Int[Tensor, " n"], choice: Int[Tensor, " n"]) -> Int[Tensor, "n *length"]:
    """The valid answer of each row that has this place among them."""
    return run.train.valid[rows, choice]


def of_all_rows(run: Run, rows: Int[Tensor, " n"], answers: Int[Tensor, "n *length"]) -> Int[Tensor, "rows *length"]:
    """Answers of some rows of `run.train` as answers of all; -1 elsewhere."""
    found = torch.full_like(run.train.canonical, -1)
    found[rows] = answers
    return found


def shares_of_valid(run: Run, rows: Int[Tensor, " n"]) -> Float[Tensor, "n_rows v"]:
    """The distribution of `run.model`, as it is now, over each row's valid answers alone; 0 in all other rows."""
    shares = torch.zeros(run.train.valid.shape)
    shares[rows] = valid_logits(run, rows).softmax(-1)
    return shares
