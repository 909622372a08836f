"""The sections on circuits: finding and evaluating one, what its heads carry, and what became of it."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from stages.pipeline.params.fields import (
    DISTINCT,
    Betas,
    Count,
    Fraction,
    NotNegative,
    NotNegativeCount,
    Positive,
    Section,
    Seed,
    as_tuple,
)


class PaperTop(Section):
    receivers: Annotated[tuple[Count, Count, Count, Count], BeforeValidator(as_tuple)]
    heads: Annotated[tuple[Count, Count, Count, Count], BeforeValidator(as_tuple)]


class Discover(Section):
    tuned: bool
    hops: Literal["auto", "paper"]
    score: Literal["logit_difference", "relative_probability"]
    examples: Count
    minimum_effect: Fraction
    minimum_head_effect: Fraction
    screen: Annotated[float, Field(gt=0, le=1)] | None
    noise_z: NotNegative
    coverage: Fraction
    merge_overlap: Fraction
    max_depth: Count
    most_senders: Count | None
    identifiable_accuracy: Fraction
    paper_top: PaperTop | None


class Evaluate(Section):
    clauses: Literal["every", "queried"]
    random_circuits: Annotated[int, Field(ge=20)]
    score: Literal["accuracy", "candidate_accuracy", "logit_difference", "p_correct"]
    idle_tolerance: Annotated[float, Field(ge=0, lt=1)]
    prune_threshold: Positive
    matching_ablations: Annotated[
        tuple[Literal["base_means", "resampled", "base_resampled"], ...], BeforeValidator(as_tuple), DISTINCT
    ]
    random_subsets: Count
    greedy_steps: Count
    greedy_examples: Count
    knockout_window: Count


_Desiderata = Annotated[tuple[str, ...], BeforeValidator(as_tuple), DISTINCT]


class Dcm(Section):
    desiderata: Annotated[_Desiderata, Field(min_length=1)]
    of_base: _Desiderata
    steps: Count
    batch: Count
    learning_rate: Positive
    start: Fraction
    sparsity: NotNegative
    objective: Literal["log_probability", "logit"]
    tolerance: NotNegative


class Cmap(Section):
    clauses: Literal["every", "queried"]
    random_draws: Count
    head_examples: NotNegativeCount
    inputs: Annotated[tuple[Literal["q", "k", "v"], ...], BeforeValidator(as_tuple), DISTINCT]


class Relearning(Section):
    examples: Count
    probe_examples: Count
    share: Fraction
    most_steps: Count
    learning_rate: Positive
    betas: Betas
    weight_decay: NotNegative


class Drift(Section):
    n_examples: Annotated[int, Field(ge=4)]  # the unbiased CKA needs four
    strong_edge: Positive
    permutations: Count
    seed: Seed
    relearning: Relearning
