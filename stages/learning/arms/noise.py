"""No training: the base moved along one random direction, step by step, to see what moving that far costs.

Checkpoint i moves every parameter tensor W to W + f_i |W| G / |G|, where G is Gaussian and fixed, and
f_i = `scales[i - 1]`.
"""

from typing import TYPE_CHECKING, ClassVar

from stages.pipeline.params.fields import Rates, Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    """`scales` of the moves."""

    trained: ClassVar[bool] = False
    scales: Rates


def train(run: "Run") -> None:
    import torch

    start = run.recorder.probe.base_weights
    with torch.no_grad():
        for rung, scale in enumerate(run.section.scales, start=1):
            generator = run.draw("direction")  # the same draws for every rung, so that the direction need not be kept
            for name, weight in run.model.named_parameters():
                gaussian = torch.randn(weight.shape, generator=generator).to(weight.device)
                unit = gaussian * (start[name].norm() / gaussian.norm())
                weight.copy_(start[name] + scale * unit)
            run.recorder.keep(rung, gradient_steps=0, completions=0)
