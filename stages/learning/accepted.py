"""Supervised fine-tuning on the valid answers that another run of policy gradient sampled, step by step.

1. The model learns by policy gradient as arm `dr_grpo` does, with the same draws, and the valid samples of every step
   are written down; then it gets the weights back that it began with.
2. Step i of the supervised run is cross-entropy on the valid samples of step i, their mean, each as often as it was
   drawn. A step without any teaches nothing.

So both learn from the same answers, with the same spread over them, in the same order; what is left between them is the
gradient: what else was sampled is pushed down by the one and not seen by the other, and the samples are the one's own.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from stages.learning import reinforcement, supervised
from stages.learning.policy_gradient import DrGRPO
from stages.learning.rewards import validity
from stages.learning.run import Run, Watcher


class _NoOne(Watcher):
    def after(self, step: int, completions: int) -> bool:
        return False


def valid_samples(run: Run, section: DrGRPO) -> Float[Tensor, "step prompt v"]:
    """How often each valid answer of each prompt of a step is sampled there by a policy gradient run from `run.model`,
    which is as before afterwards.

    Args:
        run: prompts, order and draws.
        section: settings of the policy gradient, one gradient step a batch.
    """
    place = {step: {int(row): at for at, row in enumerate(rows)} for step, rows in enumerate(run.order)}
    counts = torch.zeros(*run.order.shape, run.train.valid.shape[1])
    steps = iter(range(len(run.order)))
    reward = validity(run.train.valid)

    def noted(prompts: list[str], completion_ids: list[list[int]], **rest: object) -> list[float | None]:
        found, step = reward(prompts, completion_ids, **rest), next(steps)
        for prompt, ids, won in zip(prompts, completion_ids, found, strict=True):
            if won:
                option = int((run.train.valid[int(prompt)] == ids[0]).nonzero()[0, 0])
                counts[step, place[step][int(prompt)], option] += 1
        return found

    start = [weight.detach().clone() for weight in run.model.parameters()]
    reinforcement.fit(replace(run, section=section, watcher=_NoOne()), noted)
    with torch.no_grad():
        for weight, before in zip(run.model.parameters(), start, strict=True):
            weight.copy_(before)
            weight.grad = None
    return counts


def fit(run: Run, section: DrGRPO) -> None:
    """Train `run.model` on the valid samples of such a run."""
    supervised.refuse_several_tokens(run)
    counts = valid_samples(run, section)
    rows = torch.from_numpy(run.order)
    shares = counts / counts.sum((1, 2), keepdim=True).clamp(min=1)
    options = run.train.valid[rows].flatten(0, 1).clamp(min=0)
    labels = torch.arange(rows.numel()).reshape(rows.shape)  # a prompt of a step, as a row comes again in later ones
    weights = shares.flatten(0, 1) * rows.shape[1]  # the trainer takes the mean over prompts
    supervised.fit_sequences(
        run, run.train.input_ids[rows], labels, supervised.SoftTargetTrainer, options=options, weights=weights
    )
