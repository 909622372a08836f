"""The oracle of what trainers do: forward, loss, backward, clip, AdamW, step by step."""

from collections.abc import Callable
from typing import Any

import torch

from stages.learning.run import Run
from stages.learning.schedule import optimiser

# model, number of the step from 0, rows of `run.train` in it -> loss
LossOfStep = Callable[[Any, int, torch.Tensor], torch.Tensor]


def train_plainly(model: Any, run: Run, loss_of_step: LossOfStep) -> Any:
    """Train a model, which changes in place, on all steps of `run.order`."""
    adamw, schedule = optimiser(model, run.training, run.learning_rate)
    for step, rows in enumerate(torch.from_numpy(run.order)):
        loss = loss_of_step(model, step, rows)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.training.clip)
        adamw.step()
        schedule.step()
    return model


def of_last_token(run: Run, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> LossOfStep:
    """The loss of a step from the log-probabilities at the last token of its prompts, and its rows."""
    return lambda model, _, rows: loss(model(input_ids=run.train.input_ids[rows]).logits[:, -1].log_softmax(-1), rows)
