"""The sections on what comes out: the statistics and the report."""

from typing import Annotated

from pydantic import Field

from stages.pipeline.params.fields import Count, Fraction, Positive, Section, Seed
from stages.pipeline.params.measures import Measure

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class Contrast(Section):
    base_faithfulness: Fraction
    primary_measure: Measure
    secondary_measures: list[Measure]
    contrasts: list[Pair]
    described: list[Pair]
    controls: list[Pair]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    power: Annotated[float, Field(gt=0, lt=1)]
    equivalence_margin: Positive
    resamples: Count
    seed: Seed
    adjust_for: Measure
    families: Annotated[dict[str, list[str]], Field(min_length=2, max_length=2)]
    forgetting: Measure
    predictors: list[Measure]


class Report(Section):
    dpi: Annotated[int, Field(ge=50, le=600)]
    max_groups: Count
