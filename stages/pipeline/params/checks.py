"""Checks of values against each other, across sections."""

import re

from stages.measures.scores import score_of
from stages.pipeline.params.finetuning import Imported, trained_arms
from stages.pipeline.params.whole import Params
from stages.pipeline.stage import Invalid
from stages.tasks.new_tasks import NEW_TASKS
from stages.tasks.old_tasks import old_tasks

AXIS_VALUE = re.compile(r"[a-z0-9_]+")
TAKEN = ("base", "source", "runs", "matched")  # folders in models/ beside those of the arms


def check(params: Params) -> None:
    """Check a whole that is right section by section.

    Raises:
        Invalid: one sentence on the first problem found.
    """
    _check_axes(params)
    _check_old_task(params)
    _check_sizes(params)
    _check_levels(params)
    _check_score(params)
    if params.source.kind == "curriculum":
        _check_curriculum(params)


def _check_axes(params: Params) -> None:
    for name in ("seeds", "arms", "learning_rates"):
        values = getattr(params, name)
        if not values:
            raise Invalid(f"params.yaml: {name} is empty: must name at least one")
        if len(set(values)) < len(values):
            raise Invalid(f"params.yaml: {name} = {values}: must not name anything twice")
    arms = sorted({*trained_arms(), *params.finetune.arms})
    for arm in params.arms:
        if not AXIS_VALUE.fullmatch(arm) or arm in TAKEN:
            raise Invalid(
                f"params.yaml: arms: '{arm}' must consist of the characters a-z, 0-9 and _, and be none of "
                f"{', '.join(TAKEN)}"
            )
        if arm not in arms:
            raise Invalid(f"params.yaml: arms: there is no arm '{arm}': must be one of {', '.join(arms)}")
        if arm not in params.finetune.arms:
            raise Invalid(
                f"params.yaml: finetune.{arm} is missing: must be there, as it is one of arms (without settings, {{}})"
            )
    if params.new_task not in NEW_TASKS:
        raise Invalid(f"params.yaml: new_task = '{params.new_task}': must be one of {', '.join(NEW_TASKS)}")
    if NEW_TASKS[params.new_task].several_tokens:
        for arm in params.arms:
            if params.finetune.of(arm).one_token:
                raise Invalid(
                    f"params.yaml: arms: '{arm}' learns from answers of one token: must be left out with new_task "
                    f"'{params.new_task}', whose answers have several"
                )
    _check_shams(params)
    _check_same_samples(params)
    for key in ("contrasts", "described", "controls"):
        for arm in (arm for pair in getattr(params.contrast, key) for arm in pair):
            if arm not in arms:
                raise Invalid(f"params.yaml: contrast.{key}: there is no arm '{arm}': must be one of {', '.join(arms)}")
    if not any(set(pair) <= set(params.arms) for pair in params.contrast.contrasts):
        raise Invalid(
            f"params.yaml: contrast.contrasts = {params.contrast.contrasts}: must compare two of the arms, "
            f"{', '.join(params.arms)}"
        )

    members = [arm for family in params.contrast.families.values() for arm in family]
    for arm in members:
        if arm not in arms:
            raise Invalid(f"params.yaml: contrast.families: there is no arm '{arm}': must be one of {', '.join(arms)}")
        if members.count(arm) > 1:
            raise Invalid(f"params.yaml: contrast.families: '{arm}' stands twice: must be in one family, once")


def _check_shams(params: Params) -> None:
    match, known = params.match, {*trained_arms(), *params.finetune.arms}
    for arm in match.shams:
        if arm not in known:
            raise Invalid(
                f"params.yaml: match.shams: there is no arm '{arm}': must be one of {', '.join(sorted(known))}"
            )
    if match.like not in params.arms or match.like in match.shams:
        valid = ", ".join(arm for arm in params.arms if arm not in match.shams)
        raise Invalid(f"params.yaml: match.like = '{match.like}': must be an arm that is no sham ({valid})")
    for arm in params.arms:
        section = params.finetune.of(arm)
        if not section.trained and not isinstance(section, Imported) and arm not in match.shams:
            raise Invalid(f"params.yaml: match.shams = {list(match.shams)}: must name '{arm}', which learns nothing")


def _check_same_samples(params: Params) -> None:
    """An arm that learns from the samples of another samples as that one does."""
    for arm, of in (("sft_accepted", "dr_grpo"),):
        if {arm, of} <= set(params.arms):
            own, theirs = params.finetune.of(arm), params.finetune.of(of)
            for key in ("samples_per_prompt", "temperature"):
                if getattr(own, key) != getattr(theirs, key):
                    raise Invalid(
                        f"params.yaml: finetune.{arm}.{key} = {getattr(own, key)}: must be {getattr(theirs, key)}, as "
                        f"of {of}, whose samples it learns from"
                    )
            if (theirs.num_iterations, theirs.beta) != (1, 0.0):
                raise Invalid(
                    f"params.yaml: finetune.{of}: must have num_iterations 1 and beta 0.0 beside {arm}, which learns "
                    "from such a run's samples"
                )


def _check_old_task(params: Params) -> None:
    known = old_tasks()
    if params.old_task not in known:
        raise Invalid(f"params.yaml: old_task = '{params.old_task}': must be one of {', '.join(known)}")
    task = known[params.old_task]
    if params.source.kind == "curriculum" and task is not known["boxes"]:
        raise Invalid(
            f"params.yaml: old_task = '{task.name}': must be boxes with source.kind = curriculum, whose bases learn "
            "nothing else"
        )
    if params.discover.hops == "paper" and not task.paper_hops:
        raise Invalid(f"params.yaml: discover.hops = paper: must be auto with old_task = {task.name}, which has none")
    for key in ("desiderata", "of_base"):
        for name in getattr(params.dcm, key):
            try:
                task.parts(name)
            except Invalid as error:
                raise Invalid(f"params.yaml: dcm.{key}: {error}") from None


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
    match = params.match
    # `match` also compares with the scores of all shortcuts, measured on the data
    shortcut = NEW_TASKS[params.new_task].naming(params.synthesize.boxes)
    if match.level not in match.levels:
        valid = ", ".join(f"{level:g}" for level in match.levels)
        raise Invalid(f"params.yaml: match.level = {match.level:g}: must be one of match.levels ({valid})")
    for level in match.levels:
        if level <= shortcut:
            raise Invalid(
                f"params.yaml: match.levels: {level:g} must be above {shortcut:.3f}, "
                f"which naming any candidate of the prompt scores on {params.new_task}"
            )
    most = params.finetune.common.steps
    if max(match.steps) > most:
        raise Invalid(f"params.yaml: match.steps: {max(match.steps)} must be at most finetune.common.steps = {most}")
    if match.learning_rate not in params.learning_rates:
        raise Invalid(
            f"params.yaml: match.learning_rate = {match.learning_rate}: must be one of learning_rates, "
            f"{', '.join(map(str, params.learning_rates))}"
        )


def _check_score(params: Params) -> None:
    primary, score = params.contrast.primary_measure, params.evaluate.score
    if primary.rpartition(".")[2].startswith("retention") and score != score_of(primary):
        raise Invalid(
            f"params.yaml: evaluate.score = {score}: must be {score_of(primary)}, the score of "
            f"contrast.primary_measure = {primary}"
        )


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
