"""The sections on fine-tuning: what all arms share, each arm's own settings, and where arms are compared."""

import importlib
import pkgutil
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, create_model, model_validator

from stages.learning import arms
from stages.pipeline.params.fields import (
    DISTINCT,
    Betas,
    Count,
    Fraction,
    LearningRate,
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


class Imported(Section):
    """A model that was fine-tuned elsewhere, in place of an arm's training: a folder, or an id of the hub."""

    trained: ClassVar[bool] = False
    model: Annotated[str, Field(alias="import", min_length=1)]
    adapter: str | None
    revision: str | None


class Finetune(Section):
    """What all arms share and, by their names, the settings of arms: see `of`.

    An arm is a file in stages/learning/arms/, whose `Settings` say what its section may hold, or a name of one's own
    for an `Imported` model. Arms that no one asks for need no section.
    """

    model_config = ConfigDict(extra="allow")  # the sections of arms

    common: Common

    @model_validator(mode="before")
    @classmethod
    def _read_arms(cls, sections: Any) -> Any:
        if not isinstance(sections, dict):
            return sections
        arms = {str(name): section for name, section in sections.items() if name != "common"}
        fields: Any = {name: (_settings(name, section), ...) for name, section in arms.items()}
        return sections | dict(create_model("Arms", __base__=Section, **fields).model_validate(arms))

    def of(self, arm: str) -> Any:
        """The settings of an arm: an `Imported`, or the `Settings` of its file.

        Raises:
            KeyError: it has no section.
        """
        return (self.model_extra or {})[arm]

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms that have a section."""
        return tuple(self.model_extra or ())


@cache
def trained_arms() -> tuple[str, ...]:
    """The arms that have a file; none of them is imported for that."""
    return tuple(module.name for module in pkgutil.iter_modules(arms.__path__))


def _settings(name: str, section: Any) -> type[Section]:
    if hasattr(Section, name):
        raise ValueError(f"an arm cannot be named '{name}': must be another name")
    if name in trained_arms():
        return importlib.import_module(f"{arms.__name__}.{name}").Settings
    if isinstance(section, dict) and "import" in section:
        return Imported
    raise ValueError(
        f"there is no arm '{name}': must be one of {', '.join(trained_arms())}, or a model that was fine-tuned "
        f"elsewhere, {name}: {{import: <folder or id>, adapter: null, revision: null}}"
    )


class Match(Section):
    level: Fraction
    learning_rate: LearningRate
    confirm: NotNegativeCount
    like: str
    shams: Annotated[tuple[str, ...], BeforeValidator(as_tuple), DISTINCT]
    levels: Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple), Field(min_length=1), DISTINCT]
    kl: Annotated[Rates, DISTINCT]
    norm: Annotated[Rates, DISTINCT]
    steps: Annotated[tuple[Count, ...], BeforeValidator(as_tuple), Field(min_length=1), DISTINCT]
