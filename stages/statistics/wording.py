"""Measured numbers in words: what a measure is called, and the one sentence that answers the question.

A sentence says no more than its numbers allow; which sentence it is, is decided by `verdict`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.measures.scores import ENDINGS

# score -> its name inside a sentence
SCORES = {
    "accuracy": "accuracy",
    "candidate_accuracy": "accuracy among the candidates",
    "logit_difference": "logit difference",
    "p_correct": "probability of the answer",
}
# what heads outside the circuit give -> the same inside a sentence
ABLATIONS = {
    "own_means": "with the model's own means",
    "base_means": "with the base's means",
    "resampled": "with resampled outputs",
    "base_resampled": "with the base's resampled outputs",
}
# measure -> (short name for axes and tables, the same inside a sentence: "kept 0.9 of ...")
MEASURES = {
    **{
        f"evaluate.{circuit}.retention{ENDINGS[score]}": (
            f"Circuit retention ({name}{f', {how}' if how else ''})",
            f"of the {name} of the base's old-task circuit{f' {how}' if how else ''}",
        )
        for score, name in SCORES.items()
        for circuit, how in [("circuit", "")]
        + [(f"circuit_by_ablation.{kind}", how) for kind, how in ABLATIONS.items()]
    },
    "evaluate.circuit.faithfulness": (
        "Faithfulness of the base's circuit",
        "of its own accuracy in the base's circuit",
    ),
    "evaluate.old_accuracy": ("Old-task accuracy", "accuracy on the old task"),
    "evaluate.new_accuracy": ("New-task accuracy", "accuracy on the new task"),
    "cmap.tuned_to_base.circuit.accuracy": (
        "Tuned circuit in the base",
        "accuracy of the base with the tuned circuit",
    ),
    "cmap.base_to_tuned.circuit.accuracy": (
        "Base circuit in the tuned",
        "accuracy with the base's circuit restored",
    ),
    "drift.weight_norm": ("Norm of the weight change", "norm of the weight change"),
    "drift.old.kl": ("KL on old-task prompts", "nats of KL on old-task prompts"),
    "drift.new.kl": ("KL on new-task prompts", "nats of KL on new-task prompts"),
}


def short_name(measure: str) -> str:
    """A measure's name for axes and tables."""
    return MEASURES[measure][0] if measure in MEASURES else measure


def phrase(measure: str) -> str:
    """A measure inside a sentence, after a number."""
    return MEASURES[measure][1] if measure in MEASURES else f"in {measure}"


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A number as it is printed everywhere in the report; a dash where it is undefined."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:  # no "-0.000"
        text = text.replace("-", "+" if signed else "")
    return text.replace("-", "−")


def verdict(contrast: Mapping[str, Any], alpha: float) -> str:
    """Which of these the data of a contrast allow to say.

    - "no pair": the arms cannot be compared at any seed;
    - "one pair": an observation without uncertainty;
    - "clear": Holm-adjusted exact p (of a control, which is not adjusted, p) below alpha, and the interval leaves zero
      out;
    - "equivalent": the difference lies within the margin (TOST);
    - "suggestive": the interval leaves zero out, which rests on normality; the exact test does not confirm
      it;
    - "undecided": none of these.
    """
    if contrast["n"] == 0:
        return "no pair"
    if contrast["n"] == 1:
        return "one pair"
    apart = _without_zero(contrast["ci"])
    if apart and (contrast["p"] if contrast["p_holm"] is None else contrast["p_holm"]) < alpha:
        return "clear"
    if contrast["p_equivalent"] is not None and contrast["p_equivalent"] < alpha:
        return "equivalent"
    return "suggestive" if apart else "undecided"


def _without_zero(interval: Sequence[float]) -> bool:
    low, high = interval
    return low > 0 or high < 0


def headline(
    contrast: Mapping[str, Any],
    names: Mapping[str, str],
    plan: Mapping[str, Any],
    level: float | None,
    same_task: bool = False,
    imported: bool = False,
) -> str:
    """The answer in one sentence, from the first contrast of the primary measure.

    Args:
        contrast: its entry of statistics.json.
        names: arm -> its name for people.
        plan: of statistics.json.
        level: new-task accuracy at which arms were matched.
        same_task: the new task is the old one, which nothing is to be kept of.
        imported: one of the two was tuned elsewhere, so that they were not made equal in anything.
    """
    arm, reference = names[contrast["arm"]], names[contrast["reference"]]
    kind = verdict(contrast, plan["alpha"])
    left_out = f"{count(len(contrast['excluded']), 'pair')} left out"
    if kind == "no pair":
        return (
            f"No answer: there is no seed at which {arm} and {reference} can be compared ({left_out}: "
            f"{reasons(contrast, names)})."
        )
    difference = contrast["difference"]
    better, worse = (arm, reference) if difference > 0 else (reference, arm)
    retention = "retention" in plan["primary"]
    kept = "kept" if retention and not same_task else "had"
    what = "the old task's circuit" if retention else short_name(plan["primary"])
    task = "the task" if same_task else "the new task"
    matched = f"at the same skill in {task}{'' if level is None else f' (accuracy {number(level, 2)})'}"
    levels = (
        f"{f'with whatever skill in {task} they have' if imported else matched}, "
        f"{arm} {kept} {number(contrast['arm_mean'])} and {reference} {number(contrast['reference_mean'])} "
        f"{phrase(plan['primary'])}"
    )
    counted = count(contrast["n"], "seed pair") + (f", {left_out}" if contrast["excluded"] else "")
    if kind == "one pair":
        return (
            f"Not decided: {levels}, a difference of {number(difference, signed=True)} ({counted}), and a "
            "single pair says nothing of chance."
        )
    low, high = (number(bound, signed=True) for bound in contrast["ci"])
    interval = f"{100 * plan['confidence']:g} % interval {low} to {high}"
    facts = f"{levels}, a difference of {number(difference, signed=True)} ({interval}; {counted})"
    p = number(contrast["p"], 4)
    limit = (
        f"and {count(contrast['n'], 'pair')} cannot give less than {number(contrast['smallest_possible_p'], 4)}"
        if contrast["smallest_possible_p"] >= plan["alpha"]
        else f"Holm-adjusted {number(contrast['p_holm'], 4)}"
    )
    margin = number(plan["equivalence_margin"])
    if kind == "clear":
        small = contrast["p_equivalent"] is not None and contrast["p_equivalent"] < plan["alpha"]
        size = f", though the difference lies within the ±{margin} that count as none" if small else ""
        return f"{better} {kept} more of {what} than {worse}{size}: {facts}; exact p = {p}, {limit}."
    if kind == "equivalent":
        return (
            f"{arm} and {reference} {kept} equally much of {what}, within ±{margin}: {facts}; TOST p = "
            f"{number(contrast['p_equivalent'], 4)}."
        )
    if kind == "suggestive":
        return (
            f"A hint, not a finding, that {better} {kept} more of {what} than {worse}: {facts}; the "
            f"interval leaves zero out, but the exact test does not confirm it (p = {p}, {limit})."
        )
    return f"Not decided: {facts}, which cannot be told from none (exact p = {p}, {limit})."


def one_arm_at_a_time(adjustment: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Is the difference between the families one of the method, or of what single arms are taught? Empty where no
    such effect can be estimated.

    Args:
        adjustment: entry of statistics.json.
        names: arm -> its name for people.
    """
    known = [e for e in adjustment["by_reference"] if e["adjusted_ci"] is not None]
    if not known:
        return ""
    first, second = adjustment["families"]
    listed = ", ".join(f"{number(e['adjusted_effect'], signed=True)} {names[e['references'][0]]}" for e in known)
    apart = [e for e in known if _without_zero(e["adjusted_ci"])]
    which = " and ".join(names[e["references"][0]] for e in apart)
    if len(apart) == len(known):
        which = "all of them"
    return (
        f"{first} against each arm of {second} alone, adjusted: {listed}; the interval leaves zero out for "
        f"{which or 'none of them'}."
    )


def adjustment_sentences(adjustment: Mapping[str, Any], names: Mapping[str, str], confidence: float) -> list[str]:
    """The method's effect, by arms, and the prediction in a sentence each.

    Args:
        adjustment: entry of statistics.json.
        names: arm -> its name for people.
        confidence: coverage of its intervals.
    """
    effect, percent = adjustment["effects"][0], f"{100 * confidence:g} %"
    outcome, distance = short_name(adjustment["outcome"]), short_name(adjustment["distance"])
    lost = short_name(adjustment["forgetting"])
    if effect["adjusted_ci"] is None:
        why = effect["adjusted_why_not"]
        first = f"Does the method matter at the same distance ({effect['name']})? Not estimable: {why}."
    else:
        low, high = (number(bound, signed=True) for bound in effect["adjusted_ci"])
        apart = _without_zero(effect["adjusted_ci"])
        raw = number(effect["raw_effect"], signed=True)
        first = (
            f"{effect['name']}, {outcome}: {raw}, and {number(effect['adjusted_effect'], signed=True)} where "
            f"{distance} is taken into account ({percent} interval {low} to {high}, which "
            f"{'leaves zero out' if apart else 'holds zero'}; {count(effect['n'], 'seed')})."
        )
    found = [sentence for sentence in (first, one_arm_at_a_time(adjustment, names)) if sentence]
    known = sorted((e for e in adjustment["predictors"] if e["r2"] is not None), key=lambda e: -e["r2"])
    if not known:
        why = "; ".join(
            dict.fromkeys(e["why_not"] or "too few seeds to leave one out" for e in adjustment["predictors"])
        )
        return [*found, f"What predicts the loss of {lost}? Not estimable{': ' if why else ''}{why}."]
    listed = ", ".join(f"{short_name(e['measure'])} {number(e['r2'], 2)}" for e in known)
    best = (
        f"best predicted by {short_name(known[0]['measure'])}" if known[0]["r2"] > 0 else "predicted by none of these"
    )
    return [*found, f"The loss of {lost} is {best} (R2 in seeds that were not fitted: {listed})."]


def count(n: int, what: str) -> str:
    """ "1 pair", "2 pairs"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def reasons(contrast: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Why pairs of a contrast were left out; empty when none was."""
    return "; ".join(
        f"seed {entry['seed']}: {weakness(entry['faithfulness'])}"
        if entry["reason"] == "base left out"
        else f"seed {entry['seed']}: {entry['reason']} {' and '.join(names[model] for model in entry['models'])}"
        for entry in contrast["excluded"]
    )


def weakness(faithfulness: float | None) -> str:
    """Why a seed is left out because of its base.

    Args:
        faithfulness: of the base's circuit in place; None where none was identifiable.
    """
    if faithfulness is None:
        return "its base has no identifiable circuit"
    return f"its base circuit reaches {number(faithfulness)} of the model"


def left_out(bases: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for each base that is left out of the contrasts."""
    return " ".join(f"Seed {e['seed']}: {weakness(e['faithfulness'])}; it is left out of the contrasts." for e in bases)


def sample_of(source: str, taught: bool) -> str:
    """What the seeds are a sample of, and so what intervals speak for.

    Args:
        source: kind of what the bases are made of, as in params.yaml.
        taught: whether a pretrained base was taught the old task, by the prompts of its seed.
    """
    if source == "curriculum":
        return "Every seed has a base of its own, trained from nothing: intervals speak for bases of this one recipe."
    if taught:
        return (
            "All bases are one pretrained model, which every seed teaches the old task with prompts of its own: "
            "intervals speak for seeds of teaching and fine-tuning in this model, not for other models."
        )
    return (
        "All seeds have the same base, a pretrained model as it is: intervals speak for seeds of fine-tuning in this "
        "model, not for other models, and a number of the base is one number however many seeds there are."
    )
