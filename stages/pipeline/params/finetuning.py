"""The sections on fine-tuning: what all arms share, each arm's own settings, and where arms are compared."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from stages.pipeline.params.fields import (
    DISTINCT,
    Betas,
    Count,
    Fraction,
    NotNegative,
    NotNegativeCount,
    Positive,
    Rates,
    Section,
    Seed,
    as_tuple,
)


class Lora(Section):
    """Adapters that are trained instead of all weights."""

    rank: Count
    alpha: Count
    modules: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1), DISTINCT]


class Common(Section):
    """What all arms share."""

    learning_rates: Rates
    steps: Count
    prompts_per_step: Count
    dense_until: Count
    dense_every: Count
    sparse_checkpoints: Count
    probe_examples: Count
    betas: Betas
    epsilon: Positive
    weight_decay: NotNegative
    clip: Positive
    warmup_steps: NotNegativeCount
    seed: Seed
    lora: Lora | None


class Empty(Section):
    """An arm without settings of its own."""


class SelfSft(Section):
    temperature: Positive


class Reinforce(Section):
    samples_per_prompt: Annotated[int, Field(ge=2)]
    temperature: Positive


class Grpo(Reinforce):
    beta: NotNegative


class SftReplay(Section):
    fraction: Annotated[float, Field(gt=0, le=1)]


class IterativeSft(SelfSft):
    every: Count


class RandomReward(Reinforce):
    probability: Annotated[float, Field(gt=0, lt=1)]


class Noise(Section):
    scales: Rates
    learning_rates: Annotated[tuple[float, ...], BeforeValidator(as_tuple)]


class Finetune(Section):
    """One line an arm; this is the registry of arms, beside the files in stages/learning/arms/."""

    common: Common
    sft_gold: Empty
    sft_far: Empty
    sft_oracle: Empty
    self_sft: SelfSft
    iterative_sft: IterativeSft
    reinforce: Reinforce
    grpo: Grpo
    grpo_kl: Grpo
    rloo: Reinforce
    random_reward: RandomReward
    sft_replay: SftReplay
    joint: Empty
    noise: Noise


class Match(Section):
    level: Fraction
    learning_rate: Positive
    confirm: NotNegativeCount
    noise_like: str
    levels: Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple), Field(min_length=1), DISTINCT]
    kl: Annotated[Rates, DISTINCT]
    norm: Annotated[Rates, DISTINCT]
    steps: Annotated[tuple[Count, ...], BeforeValidator(as_tuple), Field(min_length=1), DISTINCT]
