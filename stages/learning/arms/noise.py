"""No training: the base moved along one random direction, step by step, to see what moving that far costs.

Checkpoint i moves every parameter tensor W to W + f_i |W| G / |G|, where G is Gaussian and fixed, and
f_i = `scales[i - 1]`.
"""

import torch

from stages.learning.run import Run


@torch.no_grad()
def train(run: Run) -> None:
    generator = run.draw("direction")
    start = {name: weight.clone() for name, weight in run.model.named_parameters()}
    unit = {}
    for name, weight in start.items():
        gaussian = torch.randn(weight.shape, generator=generator)
        unit[name] = gaussian * (weight.norm() / gaussian.norm())
    for rung, scale in enumerate(run.section.scales, start=1):
        for name, weight in run.model.named_parameters():
            weight.copy_(start[name] + scale * unit[name])
        run.recorder.keep(rung, gradient_steps=0, completions=0)
