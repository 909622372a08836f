"""When and on what: steps of the checkpoints, order of the prompts, the optimiser and its learning rate."""

import numpy as np
import torch
from jaxtyping import Int

from stages.learning.settings import Training


def checkpoint_steps(training: Training) -> tuple[int, ...]:
    """Steps after which weights are kept: even spacing at first, when most is lost, then log-spaced."""
    dense = range(training.dense_every, min(training.dense_until, training.steps) + 1, training.dense_every)
    start = max(1, min(training.dense_until, training.steps))
    sparse = np.geomspace(start, training.steps, training.sparse_checkpoints + 1)[1:]
    return tuple(sorted({*dense, *(int(step) for step in np.rint(sparse)), training.steps}))


def prompt_order(n: int, training: Training, seed: int) -> Int[np.ndarray, "step prompt"]:
    """Rows of the training split that each step uses; the same for every arm and learning rate of a seed.

    Epochs are whole: every row is used once before any is used again.

    Args:
        n: rows in the training split.
        seed: fine-tuning seed.
    """
    draw = np.random.default_rng([training.seed, seed, 0])
    wanted = training.steps * training.prompts_per_step
    epochs = [draw.permutation(n) for _ in range(-(-wanted // n))]
    return np.concatenate(epochs)[:wanted].reshape(training.steps, training.prompts_per_step)


def optimiser(
    model: torch.nn.Module, training: Training, learning_rate: float
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over all trained parameters with a rate that is constant after `warmup_steps` steps of linear warm-up."""
    adamw = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=learning_rate,
        betas=training.betas,
        eps=training.epsilon,
        weight_decay=training.weight_decay,
    )
    # Counted so that the first step moves too: a warm-up from 0 would spend the first batch on nothing.
    rise = training.warmup_steps + 1
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: min(1.0, (step + 1) / rise))
