"""The sections on data and bases: what bases are made of, the data sets, and how a base is trained or taught."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.pipeline.params.fields import (
    Betas,
    Count,
    Fraction,
    Interval,
    NotNegative,
    NotNegativeCount,
    Positive,
    Section,
    Seed,
    exactly,
)
from stages.pipeline.params.tasks import LEARNED_LATE, MOST_BOXES


class Source(Section):
    """What bases are made of."""

    kind: Literal["curriculum", "package", "hub"]
    model: str | None
    revision: str | None
    adapter: str | None
    bos: str | None

    @model_validator(mode="after")
    def _name_a_model_of_the_hub(self) -> "Source":
        if (self.model is None) == (self.kind == "hub"):
            raise ValueError(
                f"model = {self.model}: must be a folder or the id of a model on the hub with kind: hub, else null"
            )
        if self.kind != "hub" and (self.revision is not None or self.adapter is not None):
            raise ValueError("revision and adapter belong to a model with kind: hub, else they must be null")
        return self


class Teach(Section):
    """The old task, taught to a pretrained model."""

    level: Fraction
    most_steps: Count
    prompts_per_step: Count
    learning_rate: Positive
    warmup_steps: NotNegativeCount
    spread: Annotated[float, Field(ge=0, lt=1)]
    check_every: Count
    check_prompts: Count
    weight_decay: NotNegative
    clip: Positive


class Synthesize(Section):
    """Data sets."""

    seed: Seed
    boxes: Annotated[int, Field(ge=3, le=MOST_BOXES)]  # three clauses, so that desiderata differ
    old: Annotated[dict[str, Count], exactly("selection", "discovery", "pruning", "evaluation", "relearning", "means")]
    new: Annotated[dict[str, Count], exactly("train", "selection", "evaluation")]
    desiderata: Annotated[dict[str, Count], exactly("train", "selection", "test")]


class ModelSize(Section):
    layers: Count
    heads: Count
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)]
    width: Count
    mlp: Count
    rope_theta: Positive
    init_std: Positive


class Optimiser(Section):
    learning_rate: Positive
    betas: Betas
    weight_decay: NotNegative
    clip: Positive
    warmup: NotNegativeCount
    final: Fraction


class Until(Section):
    template: str
    boxes: Count
    accuracy: Fraction


class TaskShare(Section):
    share: Fraction
    own: Fraction


class Phase(Section):
    repeats: Fraction
    templates: dict[str, Positive]
    boxes: Interval
    most_boxes_share: Fraction
    spread: Fraction
    tasks: dict[str, TaskShare]
    until: Until | None
    most_steps: Count

    @field_validator("tasks")
    @classmethod
    def _know_the_tasks(cls, tasks: dict[str, TaskShare]) -> dict[str, TaskShare]:
        unknown = sorted(set(tasks) - set(LEARNED_LATE))
        if unknown:
            raise ValueError(f"names the task '{unknown[0]}': must be one of {', '.join(LEARNED_LATE)}")
        if sum(task.share for task in tasks.values()) > 1:
            raise ValueError("the shares of the tasks must add up to at most 1")
        return tasks


class Pretrain(Section):
    """The base."""

    retries: NotNegativeCount
    batch: Count
    language_model_weight: NotNegative
    check_every: Count
    check_prompts: Count
    settle: NotNegativeCount
    stop_at: Annotated[float, Field(gt=0, le=1)] | None
    model: ModelSize
    optimiser: Optimiser
    curriculum: dict[str, Phase]

    @field_validator("curriculum")
    @classmethod
    def _keep_the_name_of_the_settling(cls, curriculum: dict[str, Phase]) -> dict[str, Phase]:
        if "settle" in curriculum:
            raise ValueError("no phase may be named 'settle': so are called the steps after the last one")
        return curriculum

    @model_validator(mode="after")
    def _settle_or_stop(self) -> "Pretrain":
        if self.settle and self.stop_at is not None:
            raise ValueError(f"settle = {self.settle}: must be 0 with stop_at, which ends the training before")
        return self
