"""The sections on what comes out: the statistics and the report."""

from typing import Annotated

from pydantic import Field

from stages.pipeline.params.fields import Count, Fraction, Positive, Section, Seed


class Contrast(Section):
    base_faithfulness: Fraction
    primary_measure: str
    secondary_measures: list[str]
    contrasts: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    controls: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    power: Annotated[float, Field(gt=0, lt=1)]
    equivalence_margin: Positive
    resamples: Count
    seed: Seed
    adjust_for: str
    families: Annotated[dict[str, list[str]], Field(min_length=2, max_length=2)]
    forgetting: str
    predictors: list[str]


class Report(Section):
    dpi: Annotated[int, Field(ge=50, le=600)]
    max_groups: Count
