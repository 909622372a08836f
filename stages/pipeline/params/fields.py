"""What sections are made of: their base class, types with a range, and checks of one value."""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
NotNegativeCount = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A section of params.yaml: every key required, no other key allowed, no silent conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    # of an arm's settings:
    one_token: ClassVar[bool] = False  # whether it learns from answers of one token alone
    stream: ClassVar[str | None] = None  # the name by which it draws, where that is not its own
    trained: ClassVar[bool] = True  # whether it takes gradient steps here


class Sampling(Section):
    """Answers that a model draws for each prompt."""

    samples_per_prompt: Annotated[int, Field(ge=2)]
    temperature: Positive


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def exactly(*names: str) -> AfterValidator:
    """A mapping that names exactly these."""

    def check(sizes: dict[str, int]) -> dict[str, int]:
        if set(sizes) != set(names):
            raise ValueError(f"names {', '.join(sizes)}: must name exactly {', '.join(names)}")
        return sizes

    return AfterValidator(check)


def _not_whole(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError(f"{value}: must be written {float(value)}, as folders and cells have it in their names")
    return value


LearningRate = Annotated[float, BeforeValidator(_not_whole), Field(gt=0, allow_inf_nan=False)]
Interval = Annotated[tuple[Count, Count], BeforeValidator(as_tuple)]
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(as_tuple)
]
Rates = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple), Field(min_length=1)]


def _distinct(values: tuple[int | float | str, ...]) -> tuple[int | float | str, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{list(values)}: must not name a value twice")
    return values


DISTINCT = AfterValidator(_distinct)
