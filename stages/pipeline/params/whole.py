"""All sections together."""

from stages.pipeline.params.bases import Pretrain, Source, Synthesize, Teach
from stages.pipeline.params.circuits import Cmap, Dcm, Discover, Drift, Evaluate
from stages.pipeline.params.fields import LearningRate, Section, Seed
from stages.pipeline.params.finetuning import Finetune, Match
from stages.pipeline.params.reporting import Contrast, Report


class Params(Section):
    """The whole of params.yaml."""

    seeds: list[Seed]
    arms: list[str]
    learning_rates: list[LearningRate]
    old_task: str
    new_task: str
    source: Source
    synthesize: Synthesize
    pretrain: Pretrain
    teach: Teach | None
    finetune: Finetune
    match: Match
    discover: Discover
    evaluate: Evaluate
    dcm: Dcm
    cmap: Cmap
    drift: Drift
    contrast: Contrast
    report: Report

    @property
    def models(self) -> list[str]:
        """The base and the models that the arms make of it."""
        return ["base", *self.arms]
