"""What every arm has in common: the section `finetune.common` of params.yaml as one frozen value."""

from dataclasses import dataclass
from typing import Any

CurveRow = dict[str, int | float]  # columns of a training curve at one checkpoint
# Arms that learn from right answers of their choice: where a prompt has one, from the same ones as `sft_gold`.
CHOOSING = ("sft_far", "sft_oracle", "self_sft", "iterative_sft")
NO_RATE = 0.0  # stands for the learning rate in the curve of an arm that takes no gradient steps here


@dataclass(frozen=True)
class Training:
    """Everything that must be equal between arms, so that only the arm differs.

    Attributes:
        steps: gradient steps of a run.
        prompts_per_step: different new-task prompts in each step.
        dense_until, dense_every: a checkpoint every `dense_every` steps up to step `dense_until`.
        sparse_checkpoints: checkpoints after `dense_until`, log-spaced up to the last step.
        probe_examples: examples of each selection split that are scored at a checkpoint.
        betas, epsilon, weight_decay: of AdamW.
        clip: maximal gradient norm.
        warmup_steps: linear warm-up; the rate is constant afterwards.
        seed: base of every random draw, together with the arm and its seed.
        lora: train adapters with these settings (`adapters.LoraSettings`), or None: all weights.
    """

    steps: int
    prompts_per_step: int
    dense_until: int
    dense_every: int
    sparse_checkpoints: int
    probe_examples: int
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip: float
    warmup_steps: int
    seed: int
    lora: Any = None
