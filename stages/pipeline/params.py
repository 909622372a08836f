"""What params.yaml may say: every section, its types and ranges, checked as a whole before any work.

There are no defaults here: a value that a stage uses is written in params.yaml, where DVC tracks it. So this module can
refuse a run, but never change what one computes.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from stages.pipeline.stage import Invalid

AXIS_VALUE = re.compile(r"[a-z0-9_]+")

Count = Annotated[int, Field(ge=1)]
NotNegativeCount = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class _Loader(yaml.SafeLoader):
    """PyYAML's, which also takes 1e-5 for a number, as YAML 1.2 does, and DVC, which writes numbers so."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """What params, or a value of one, say.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


class Section(BaseModel):
    """A section of params.yaml: every key required, no other key allowed, no silent conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _names(*names: str) -> AfterValidator:
    """A mapping that names exactly these."""

    def check(sizes: dict[str, int]) -> dict[str, int]:
        if set(sizes) != set(names):
            raise ValueError(f"names {', '.join(sizes)}: must name exactly {', '.join(names)}")
        return sizes

    return AfterValidator(check)


Interval = Annotated[tuple[Count, Count], BeforeValidator(_as_tuple)]
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_as_tuple)
]
Rates = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


def _distinct(values: tuple[int | float | str, ...]) -> tuple[int | float | str, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{list(values)}: must not name a value twice")
    return values


_DISTINCT = AfterValidator(_distinct)

LEARNED_LATE = ("adjacent", "lacks", "precedes", "arithmetic")  # the base learns a little of them, in a late phase
NEW_TASKS = (*LEARNED_LATE, "contains")
HYPOTHESES = ("positional", "object_value", "box_label_value", "next_clause")  # of what a group of heads carries
WORDINGS = (
    "text_start",
    "text_end",
    "contained",
    "segment_start",
    "segment_end",
    "add_box",
    "other_order",
    "no_comma",
    "add_comma",
    "clause",
)  # of the source
MOST_BOXES = 25  # one letter fewer than there are: the query of a corrupt partner needs one that no box has


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
    old: Annotated[dict[str, Count], _names("selection", "discovery", "pruning", "evaluation", "relearning", "means")]
    new: Annotated[dict[str, Count], _names("train", "selection", "evaluation")]
    desiderata: Annotated[dict[str, Count], _names("train", "selection", "test")]


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


class Lora(Section):
    """Adapters that are trained instead of all weights."""

    rank: Count
    alpha: Count
    modules: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1), _DISTINCT]


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
    learning_rates: Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]


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
    levels: Annotated[tuple[Fraction, ...], BeforeValidator(_as_tuple), Field(min_length=1), _DISTINCT]
    kl: Annotated[Rates, _DISTINCT]
    norm: Annotated[Rates, _DISTINCT]
    steps: Annotated[tuple[Count, ...], BeforeValidator(_as_tuple), Field(min_length=1), _DISTINCT]


class PaperTop(Section):
    receivers: Annotated[tuple[Count, Count, Count, Count], BeforeValidator(_as_tuple)]
    heads: Annotated[tuple[Count, Count, Count, Count], BeforeValidator(_as_tuple)]


class Discover(Section):
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
    identifiable_accuracy: Fraction
    paper_top: PaperTop | None


class Evaluate(Section):
    clauses: Literal["every", "queried"]
    random_circuits: Annotated[int, Field(ge=20)]
    prune_threshold: Positive
    random_subsets: Count
    greedy_steps: Count
    greedy_examples: Count
    knockout_window: Count


def _desiderata(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        hypothesis, dash, wording = name.partition("-")
        if hypothesis not in HYPOTHESES or (dash and wording not in WORDINGS):
            raise ValueError(
                f"'{name}': must be one of {', '.join(HYPOTHESES)}, alone or followed by '-' and the wording of the "
                f"source ({', '.join(WORDINGS)})"
            )
    return names


_Desiderata = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), AfterValidator(_desiderata), _DISTINCT]


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
    inputs: Annotated[tuple[Literal["q", "k", "v"], ...], BeforeValidator(_as_tuple), _DISTINCT]


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


class Params(Section):
    """The whole of params.yaml."""

    seeds: list[Seed]
    arms: list[str]
    models: list[str]
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


def load_params(path: str | Path) -> Params:
    """Read and check a params file as a whole.

    Raises:
        Invalid: one sentence on the first problem found.
    """
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Invalid(f"there is no {path} here; run from the top of the repository") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise Invalid(f"{path} is not valid YAML{'' if line is None else f', near line {line + 1}'}") from None
    if not isinstance(data, dict):
        raise Invalid(f"{path} must hold a mapping of sections")
    try:
        params = Params.model_validate(data)
    except ValidationError as error:
        raise Invalid(_sentence(error)) from None
    _check_axes(params)
    _check_sizes(params)
    _check_levels(params)
    if params.source.kind == "curriculum":
        _check_curriculum(params)
    return params


def _check_axes(params: Params) -> None:
    for name, values in (("seeds", params.seeds), ("arms", params.arms)):
        if not values:
            raise Invalid(f"params.yaml: {name} is empty: must name at least one")
        if len(set(values)) < len(values):
            raise Invalid(f"params.yaml: {name} = {values}: must not name anything twice")
    arms = [name for name in Finetune.model_fields if name != "common"]
    for arm in params.arms:
        if not AXIS_VALUE.fullmatch(arm):
            raise Invalid(f"params.yaml: arms: '{arm}' must consist of the characters a-z, 0-9 and _")
        if arm not in arms:
            raise Invalid(f"params.yaml: arms: there is no arm '{arm}': must be one of {', '.join(arms)}")
    if params.models != ["base", *params.arms]:
        raise Invalid(
            f"params.yaml: models = {params.models}: must be base and then the arms, {['base', *params.arms]}"
        )
    if params.new_task not in NEW_TASKS:
        raise Invalid(f"params.yaml: new_task = '{params.new_task}': must be one of {', '.join(NEW_TASKS)}")
    if params.match.noise_like not in params.arms or params.match.noise_like == "noise":
        valid = ", ".join(arm for arm in params.arms if arm != "noise")
        raise Invalid(f"params.yaml: match.noise_like = '{params.match.noise_like}': must be a trained arm ({valid})")
    for key in ("contrasts", "controls"):
        for arm in (arm for pair in getattr(params.contrast, key) for arm in pair):
            if arm not in params.arms:
                valid = ", ".join(params.arms)
                raise Invalid(f"params.yaml: contrast.{key}: '{arm}' must be one of the arms {valid}")

    members = [arm for family in params.contrast.families.values() for arm in family]
    for arm in members:
        if arm not in arms:
            raise Invalid(f"params.yaml: contrast.families: there is no arm '{arm}': must be one of {', '.join(arms)}")
        if members.count(arm) > 1:
            raise Invalid(f"params.yaml: contrast.families: '{arm}' stands twice: must be in one family, once")


def _check_sizes(params: Params) -> None:
    common, synthesize = params.finetune.common, params.synthesize
    if params.discover.examples > synthesize.old["discovery"]:
        raise Invalid(
            f"params.yaml: discover.examples = {params.discover.examples}: "
            f"must be at most synthesize.old.discovery = {synthesize.old['discovery']}"
        )
    for name, size, split in (
        ("examples", params.drift.relearning.examples, "relearning"),
        ("probe_examples", params.drift.relearning.probe_examples, "selection"),
    ):
        if size > synthesize.old[split]:
            raise Invalid(
                f"params.yaml: drift.relearning.{name} = {size}: "
                f"must be at most synthesize.old.{split} = {synthesize.old[split]}"
            )
    if common.dense_until > common.steps:
        raise Invalid(
            f"params.yaml: finetune.common.dense_until = {common.dense_until}: "
            f"must be at most finetune.common.steps = {common.steps}"
        )


def _check_levels(params: Params) -> None:
    boxes, match = params.synthesize.boxes, params.match
    # what naming any object of the context scores; `match` also compares with the scores measured on the data
    shortcut = {"adjacent": min(2, boxes - 1), "lacks": boxes - 1, "precedes": 1, "contains": 1, "arithmetic": 0}[
        params.new_task
    ] / boxes
    if match.level not in match.levels:
        valid = ", ".join(f"{level:g}" for level in match.levels)
        raise Invalid(f"params.yaml: match.level = {match.level:g}: must be one of match.levels ({valid})")
    for level in match.levels:
        if level <= shortcut:
            raise Invalid(
                f"params.yaml: match.levels: {level:g} must be above {shortcut:.3f}, "
                f"which naming any object of the context scores on {params.new_task}"
            )
    most = params.finetune.common.steps
    if max(match.steps) > most:
        raise Invalid(f"params.yaml: match.steps: {max(match.steps)} must be at most finetune.common.steps = {most}")
    rates = params.finetune.common.learning_rates
    if match.learning_rate not in rates:
        valid = ", ".join(f"{rate:g}" for rate in rates)
        raise Invalid(f"params.yaml: match.learning_rate = {match.learning_rate:g}: must be one of {valid}")


def _check_curriculum(params: Params) -> None:
    """What only bases that are trained from nothing can get wrong."""
    learned = {task for phase in params.pretrain.curriculum.values() for task in phase.tasks}
    if params.new_task not in {*learned, "contains"}:
        raise Invalid(
            f"params.yaml: new_task = '{params.new_task}': must be a task of a phase of pretrain.curriculum "
            f"({', '.join(sorted(learned))}), so that the base is right now and then"
        )
    for name, phase in params.pretrain.curriculum.items():
        if phase.boxes[1] > params.synthesize.boxes:
            raise Invalid(
                f"params.yaml: pretrain.curriculum.{name}.boxes = {list(phase.boxes)}: "
                f"must be at most synthesize.boxes = {params.synthesize.boxes}"
            )
    stop_at, level = params.pretrain.stop_at, params.match.level
    if params.new_task == "contains" and (stop_at is None or stop_at >= level):
        raise Invalid(
            f"params.yaml: pretrain.stop_at = {'null' if stop_at is None else stop_at}: must be below "
            f"match.level = {level} where the new task is the old one, or nothing is left to learn"
        )


def _sentence(error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence with parameter, value and what is valid."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"params.yaml: {where} is missing"
    if first["type"] == "extra_forbidden":
        return f"params.yaml: {where} is not a known parameter"
    if first["type"] == "value_error":
        return f"params.yaml: {where or 'params'}: {first.get('ctx', {}).get('error', first['msg'])}"
    value = repr(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    message = first["msg"].removeprefix("Input should be ").removeprefix("a ")
    return f"params.yaml: {where} = {value}: must be {message}"
