"""The report's words, tables and order, from summary.json alone, and its two renderings.

`document` builds one structure of sections; the templates beside it turn it into HTML and Markdown, so that
both say the same. Every number comes out of the summary through `number` (a test checks it).
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.figures.style import label
from stages.statistics.wording import count, left_out, number, phrase, reasons, short_name

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: its file is figures/<name>.png.
        caption: what to look at, and what one sees.
    """

    name: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of texts; the first `text_columns` columns are words, the others numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Section:
    """A part of the report; `folded` ones are closed at first in HTML."""

    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    folded: bool = False


@dataclass(frozen=True)
class Document:
    """The report.

    Attributes:
        title, question, answer: at its head.
        limits: which bases are left out, and what the number of pairs allows to say.
        how_to_read: one line for those who were not there.
        sections: in order.
    """

    title: str
    question: str
    answer: str
    limits: str
    how_to_read: str
    sections: Sequence[Section] = field(default_factory=tuple)


def document(summary: Mapping[str, Any]) -> Document:
    """Write the report."""
    return Document(
        title="Which way of fine-tuning keeps a model's old circuit?",
        question=(
            "When a language model learns a new task, which way of fine-tuning it, supervised (SFT) or "
            "reinforcement learning (RL), keeps the circuit of its old task?"
        ),
        answer=summary["headline"]["sentence"],
        limits=f"{left_out(summary['bases_left_out'])} {summary['power_note']}".strip(),
        how_to_read=(
            "Every seed gives one base model that solves the old task; all arms start from that base and "
            "are compared at the same accuracy in the new task. Warm colours are SFT, blue is RL, purple "
            f"and grey are controls; {label('base')} is black. A dot is a seed; filled means compared, "
            "hollow means left out of the contrasts, because the arm never reached the matching level or "
            "because the base's own circuit does not work. Means in the contrasts and their tables are of what "
            "is compared; the figures after them include every base. Retention is the share of what the base's "
            "circuit did alone in the base that it still does alone in the tuned model (everything else "
            "mean-ablated): 1 is untouched."
        ),
        sections=(
            _answer(summary),
            _checks(summary),
            _tasks(summary),
            *([_enhancement(summary)] if summary["table_enhancement"] else []),
            _matchings(summary),
            _circuit(summary),
            _similarity(summary),
            _distance(summary),
            _transplants(summary),
            _carried(summary),
            _learning(summary),
            _tables(summary),
            _left_out(summary),
            _provenance(summary),
        ),
    )


def _answer(summary: Mapping[str, Any]) -> Section:
    plan = summary["plan"][0]
    entries = [entry for entry in summary["table_contrasts"] if entry["measure"] == plan["primary"]]
    verdicts = summary["contrasts"]
    by_example = any(e["ci_hierarchical"] for e in entries)  # records of older runs have no outcomes by example
    rows = [
        (
            _contrast_name(e),
            verdicts[e["name"]]["verdict"],
            str(e["n"]),
            number(e["difference"], signed=True),
            _interval(e["ci"]),
            _interval(e["ci_bootstrap"]),
            *([_interval(e["ci_hierarchical"])] if by_example else []),
            number(e["p"], 4),
            number(e["p_holm"], 4),
            number(e["p_equivalent"], 4),
        )
        for e in entries
    ]
    percent = f"{100 * plan['confidence']:g} %"
    return Section(
        "The contrasts",
        (
            f"Primary measure: {short_name(plan['primary'])}, the share {phrase(plan['primary'])} that is left. The "
            "hypotheses (H) were fixed in params.yaml before the runs; their p values are corrected together (Holm, "
            f"{len(summary['table_family'])} hypotheses, the last two of which are not about two arms). Controls (C) "
            "say whether the experiment could have shown anything; they are not corrected.",
        ),
        (
            Picture(
                "contrasts",
                "Left: what each arm keeps; bars are means over seeds, the dotted line is what random "
                f"circuits of the same shape have. Right: paired differences with {percent} t intervals; "
                f"the grey band (±{number(plan['equivalence_margin'])}) counts as no difference; p is the "
                "exact sign-flip test, not yet corrected. An arrow head at the edge is an interval that "
                "goes on beyond it.",
            ),
        ),
        (
            Table(
                f"Contrasts of the primary measure. Clear: corrected p below {plan['alpha']:g} and an "
                "interval without zero. Suggestive: only the interval. Equivalent: inside the margin "
                "(TOST). Undecided: none of these."
                + (
                    " The hierarchical bootstrap draws seeds, and examples inside them; like the plain one it is too "
                    "narrow where seeds are few."
                    if by_example
                    else ""
                ),
                (
                    "Contrast",
                    "Verdict",
                    "Pairs",
                    "Difference",
                    f"{percent} t interval",
                    "Bootstrap interval",
                    *(["Hierarchical bootstrap"] if by_example else []),
                    "Exact p",
                    "Holm p",
                    "TOST p",
                ),
                rows,
                2,
            ),
            _further_hypotheses(summary),
        ),
    )


def _further_hypotheses(summary: Mapping[str, Any]) -> Table:
    adjustment, percent = summary["adjustment"][0], f"{100 * summary['plan'][0]['confidence']:g} %"
    effect, prediction = adjustment["effects"][0], adjustment["prediction"]
    by_distance, by_prediction = summary["table_family"][-2:]
    first, second = (short_name(measure) for measure in [*prediction["measures"], "–", "–"][:2])
    closeness = " and ".join(number(mean, 2) for mean in prediction["correlations"] or ())
    return Table(
        f"The two hypotheses that are not about two arms. {by_distance['name']}: t test of the method's effect in a "
        f"linear model with the distance and the seed (an effect above zero: {effect['name'].split(' − ')[0]} keeps "
        f"more). {by_prediction['name']}: exact sign-flip test of how much more closely the loss goes with the one "
        f"distance than with the other (correlations over the models of a seed, on average {closeness}). More of both "
        f"under “Forgetting against distance”. {adjustment['one_arm_at_a_time']}".rstrip(),
        ("Hypothesis", "Seeds", "Estimate", f"{percent} interval", "p", "Holm p"),
        (
            (
                f"{by_distance['name']}: {effect['name']}, {short_name(adjustment['outcome'])}, at equal "
                f"{short_name(adjustment['distance'])}",
                str(effect["n"]),
                number(effect["adjusted_effect"], signed=True),
                _interval(effect["adjusted_ci"]),
                number(by_distance["p"], 4),
                number(by_distance["p_holm"], 4),
            ),
            (
                f"{by_prediction['name']}: loss of {short_name(adjustment['forgetting'])}, how much more closely it "
                f"goes with {first} than with {second}",
                str(prediction["n"]),
                number(prediction["difference"], signed=True),
                _interval(prediction["ci"]),
                number(by_prediction["p"], 4),
                number(by_prediction["p_holm"], 4),
            ),
        ),
        1,
    )


def _checks(summary: Mapping[str, Any]) -> Section:
    verdicts = {True: "pass", False: "fail", None: "no data"}
    rows = [(check["what"], verdicts[check["holds"]], check["found"]) for check in summary["table_checks"]]
    table = Table(
        "A check that fails limits what the contrasts can say.", ("What should hold", "Check", "Found"), rows, 3
    )
    plan = summary["plan"][0]
    resolved = [
        (
            _contrast_name(e),
            str(e["n"]),
            *(number(e[key]) for key in ("sd", "detectable", "provable_margin")),
        )
        for e in summary["table_contrasts"]
        if e["measure"] == plan["primary"]
    ]
    resolution = Table(
        "What the pairs can resolve at the spread that was seen: the smallest true difference of the primary measure "
        f"that a paired t test at {plan['alpha']:g}, not corrected, detects with {100 * plan['power']:g} % power, and "
        "the smallest margin within which TOST shows equal arms to be equal as often.",
        ("Contrast", "Pairs", "SD of differences", "Detectable difference", "Provable margin"),
        resolved,
        1,
    )
    return Section("Could this experiment have shown anything?", tables=(table, resolution))


def _tasks(summary: Mapping[str, Any]) -> Section:
    level = "" if summary["level"] is None else f" They are compared where they reach {number(summary['level'], 2)}."
    shortcut, name = "", summary["shortcut_name"]
    if name is not None:
        shortcut = f" The best answer without the skill ({name}) scores {number(summary['shortcut'])}."
    return Section(
        "New task against old",
        (f"The old task is entity tracking; the new task is “{summary['new_task']}”.{level}{shortcut}",),
        (
            Picture(
                "pareto",
                "Runs start at the base (star) and move right as they learn; higher is less forgotten. "
                "Thin lines are seeds, thick ones their means, marks the matched models (selection split). "
                "The random direction learns nothing: it is moved as far in weights as the arm that it "
                "imitates. The last panel shows how much of the circuit the matched models keep "
                "(evaluation split).",
            ),
        ),
        (_hypervolume(summary),),
    )


def _enhancement(summary: Mapping[str, Any]) -> Section:
    models = [
        (
            e["model"] if e["source"] else label(e["model"]),
            e["source"] or count(e["seeds"], "seed"),
            *(
                number(e[key], 2)
                for key in ("model_accuracy", "circuit_accuracy", "faithfulness", "random_accuracy", "own_accuracy")
            ),
        )
        for e in summary["table_enhancement"]
    ]
    heads = [
        (
            label(e["arm"]),
            e["group"],
            str(e["seeds"]),
            *(number(e[key], 2) for key in ("base", "transplanted", "random", "tuned")),
        )
        for e in summary["table_enhancing_heads"]
    ]
    return Section(
        "Is the existing mechanism enhanced?",
        (
            "The new task is the old one, and the bases are half-trained: the question of Prakash et al. "
            "If fine-tuning enhances the mechanism that is there, the base's circuit also does the work of the better "
            "model, and the better model's heads, put into the base, lift it, and more than as many random heads do.",
            *summary["enhancement_findings"],
        ),
        tables=(
            Table(
                "Accuracy of whole models, of the base's circuit in place in them with everything else mean-ablated, "
                "of random circuits of the same shape, and of each model's own circuit. Means over seeds. "
                "The published ones are of one model each, with Llama-7B's circuit in Llama-7B and in models that "
                "were tuned from it.",
                ("Model", "Of", "Whole model", "Base's circuit", "Faithfulness", "Random circuits", "Own circuit"),
                models,
                2,
            ),
            Table(
                "Head outputs of the tuned model in the base, by group of the base's circuit: accuracy of the base "
                "alone, with the heads of the group, with as many random heads (of all heads at the same positions), "
                "and of the tuned model alone. Means over those seeds whose circuit has the group.",
                ("Arm", "Group", "Seeds", "Base", "Base with tuned heads", "Random heads", "Tuned model"),
                heads,
                2,
            ),
        ),
    )


def _of_arms(summary: Mapping[str, Any], entries: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What there is of each arm, in the order of the params; what was read from a file has its keys sorted."""
    models = [entry["model"] for entry in summary["table_models"]]
    return [(model, entries[model]) for model in models if model in summary["arms"]]


def _hypervolume(summary: Mapping[str, Any]) -> Table:
    [found] = summary["table_hypervolume"]
    rows = [
        (label(arm), str(e["n"]), number(e["mean"]), _interval(e["ci"], False))
        for arm, e in _of_arms(summary, found["arms"])
    ]
    rows += [
        (
            _contrast_name(e),
            str(e["n"]),
            number(e["mean"], signed=True),
            _interval(e["ci"]),
        )
        for e in found["contrasts"]
    ]
    return Table(
        "Hypervolume: the area below an arm's best trade-off between new and old accuracy, over all checkpoints and "
        f"learning rates (selection split), counted from {found['reference']} and as a share of the area that full "
        "marks in both would have; means over seeds and t intervals. It describes, nothing is tested.",
        ("Arm or contrast", "Seeds", "Hypervolume", "t interval"),
        rows,
        1,
    )


_MATCHED_BY = {
    "new_accuracy": "new-task accuracy",
    "kl_new": "KL",
    "weight_norm": "weight norm",
    "gradient_steps": "gradient steps",
}


def _matchings(summary: Mapping[str, Any]) -> Section:
    entries = summary["table_matchings"]
    few = [f"{_matching_name(e)} ({e['reached']} of {e['of']} runs)" for e in entries if e["selected"]]
    reach = (
        f"Marked with *, because fewer than {summary['least_reached_percent']:g} % of the runs that learn get there, "
        f"so that those that do are a selection: {', '.join(few)}."
        if few
        else "Every one of these is reached by nearly all runs that learn."
    )
    distances = [
        (
            _matching_name(entry),
            label(arm),
            f"{found['reached']} of {found['of']}",
            *(number(found["picked"][column]) for column in ("kl_new", "weight_norm", "new_accuracy")),
            *(_mean_interval(found[measure]) for measure in ("retention", "retention_ld", "old_accuracy")),
        )
        for entry in entries
        if entry["by"] != "new_accuracy"
        for arm, found in _of_arms(summary, entry["arms"])
    ]
    names = [_contrast_name(e) for e in entries[0]["contrasts"]]
    differences = [
        (_matching_name(entry), title, *(_mean_interval(e[measure], True) for e in entry["contrasts"]))
        for measure, title in (("retention", "Retention"), ("old_accuracy", "Old-task accuracy"))
        for entry in entries
    ]
    return Section(
        "At other levels, at equal distance, and at equal budget",
        (
            "The contrasts above are at one level of the new task. Here the same checks are made at other levels, and "
            "at checkpoints that moved equally far from the base, in answers (KL) or in weights (norm), and after "
            "equally many gradient steps, always at the same learning rate. These describe; nothing is tested. "
            f"{reach}",
        ),
        (
            Picture(
                "matchings",
                "Above: what the base's circuit in place still does. Below: the old task of the whole model. Large "
                "marks are means, small ones seeds; the level of the contrasts is in bold. Every run is at its first "
                "checkpoint at the value. The random direction is moved as far in weights as the arm that it "
                "imitates; it learns nothing.",
            ),
        ),
        (
            Table(
                "At equal distance and at equal budget. Reached: seeds with a checkpoint at the value; its own KL, "
                "norm and new-task accuracy (means, selection split) say how close it came. What is kept: means on the "
                "evaluation split, over the seeds whose base counts, with t intervals.",
                (
                    "Matched on",
                    "Arm",
                    "Reached",
                    "KL",
                    "Norm",
                    "New-task accuracy",
                    "Circuit retention",
                    "in logit difference",
                    "Old-task accuracy",
                ),
                distances,
                2,
            ),
            Table(
                "The planned differences at every matching, paired over seeds, with t intervals.",
                ("Matched on", "Measure", *names),
                differences,
                2,
            ),
        ),
    )


def _contrast_name(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']}: {label(entry['arm'])} − {label(entry['reference'])}"


def _matching_name(entry: Mapping[str, Any]) -> str:
    return f"{_MATCHED_BY[entry['by']]} {entry['at']:g}{'*' if entry['selected'] else ''}"


def _mean_interval(entry: Mapping[str, Any], signed: bool = False) -> str:
    if entry["ci"] is None:
        return number(entry["mean"], signed=signed)
    return f"{number(entry['mean'], signed=signed)} ({_interval(entry['ci'], signed)})"


def _circuit(summary: Mapping[str, Any]) -> Section:
    base = summary["base"]
    return Section(
        "The circuit",
        (
            f"Means over {count(base['seeds'], 'base')}: old-task accuracy {number(base['old_accuracy'])}, "
            f"circuit of {number(base['circuit_size'], 1)} (head, position) nodes, faithfulness "
            f"{number(base['circuit_faithfulness'])}; random circuits of the same shape have "
            f"{number(base['random_faithfulness'])} (at most {number(base['random_faithfulness_max'])}).",
            "A head at a token of a clause stands before the query and cannot know which clause will be asked for, "
            "so a circuit's head is kept at that token of every clause, and removed or transplanted there. Kept in the "
            f"queried clause alone, as in Prakash et al., the circuits reach "
            f"{number(base['queried_clause_faithfulness'])}.",
        ),
        (
            Picture(
                "circuit",
                "The circuit of the first seed's base. Above: dots are attention heads, larger ones have "
                "larger path-patching scores; arrows run from a group to the group (or the logits) that "
                "reads from it, with the input that it feeds (q, k or v). Below: the same heads in the "
                "tuned models; the darker, the more their weights changed.",
            ),
            Picture(
                "nulls",
                "What a circuit does alone, everything else mean-ablated. Filled: the base's circuit in that model. "
                "Hollow: the circuit found anew in that model. Black: the whole model; where it is below the circuit, "
                "the old task is lost outside the circuit. Dashes: random circuits of the same shape. Each model has a "
                "place for every seed, in order.",
            ),
            Picture(
                "sizes",
                "How many heads are enough? The (head, position) nodes of the base are put back one after another, "
                "strongest path-patching score first, everything else being mean-ablated: a curve that rises early "
                "and stays at 1 is a small circuit that does the task alone. Dotted: the size of the base's circuit. "
                "Tuned models get the same nodes in the same order. Shares are of each model's own score: above 1, "
                "these nodes do more alone than the whole model, which then lost the task outside of them (the axis "
                "ends at 2).",
            ),
            Picture(
                "knockout",
                "Which layers carry the answer, and from where? One position is kept from seeing another in "
                "one window of layers; where accuracy falls, that path is in use there. Squares at the right: not "
                "seen in any layer. The last panel is the control, a clause that was not asked for. Where a tuned "
                "model falls with the base, it still uses the same path.",
            ),
        ),
        (_circuit_tests(summary),),
    )


def _circuit_tests(summary: Mapping[str, Any]) -> Table:
    rows = [
        (
            label(e["model"]),
            number(e["size"], 1),
            f"{number(e['core'], 1)} / {number(e['stand_ins'], 1)} / {number(e['idle'], 1)}",
            *(number(e[key], 2) for key in ("core_share", "faithfulness", "faithfulness_ld")),
            *(number(e[key], 2) for key in ("group_gap", "random_gap", "worst_gap", "cpr", "cmd")),
            number(e["enough"], 1),
        )
        for e in summary["table_circuits"]
    ]
    return Table(
        "Is the base's circuit minimal and complete? Pruning split, means over all bases, and over the "
        "seeds at which an arm reached the level. Minimal: heads that are missed (core), "
        "heads that could replace one of them (stand-ins) and heads that are "
        "not missed (idle), with the share of the circuit's accuracy that the core keeps. Complete: how far "
        "apart the accuracies of circuit and model are when the same heads are taken out of both, on average "
        "over groups and over random sets, and for the worst set that was found; 0 is complete. CPR and CMD "
        "are the areas under the size curve and between it and 1, in accuracy; enough is the number of nodes "
        "from which on circuits keep nine tenths, over the seeds where any do.",
        (
            "Model",
            "Nodes",
            "Core / stand-ins / idle",
            "Core's share",
            "Faithfulness",
            "in logit difference",
            "Gap, groups",
            "random",
            "worst",
            "CPR",
            "CMD",
            "Enough",
        ),
        rows,
        1,
    )


def _similarity(summary: Mapping[str, Any]) -> Section:
    rows = [
        (
            label(e["arm"]),
            str(e["n"]),
            *(
                f"{number(e[kind], 2)} ({number(e[f'{kind}_null'], 2)}, {number(e[f'{kind}_floor'], 2)}, "
                f"{number(e[f'{kind}_ceiling'], 2)})"
                for kind in ("cosine", "spearman")
            ),
            f"{number(e['overlap_share'], 2)} ({number(e['overlap_layered'], 2)})",
            f"{number(e['overlap_corrected'], 2)} ({number(e['overlap_ceiling_corrected'], 2)})",
            number(e["edges_change"], 2),
            number(e["edges_flipped"], 2),
            *(
                f"{number(e[f'edges_{kind}'], 2)} ({number(e[f'edges_{kind}_noise'], 2)})"
                for kind in ("weakened", "new")
            ),
            number(e["cka"], 2),
            number(e["relearning_steps"], 1),
            number(e["savings"]),
        )
        for e in summary["table_similarity"]
    ]
    pairs = summary["similarity_pairs_of_bases"]
    return Section(
        "Is it the same circuit?",
        (
            "The hops of the base are measured again in each tuned model, with the same senders, receivers and "
            "positions, so that every edge has a number in both. Models are compared across halves of the examples, "
            "so that their similarity can be read against the ceiling that the halves of one model give. The floor is "
            f"the mean over {count(pairs, 'pair')} of bases, which solve the same task with other heads. A tuned model "
            "whose old-task accuracy is too low is not identifiable and left out here.",
        ),
        (
            Picture(
                "similarity",
                "Similarity of the signed path-patching effects of all hops. The cosine is decided by the few strong "
                "edges, the rank correlation counts weak edges as much, so its ceiling is lower.",
            ),
            Picture(
                "overlap",
                "Of the base's strongest (head, position) nodes, how many are among as many strongest ones of the "
                "tuned model? Every curve ends near 1, where all nodes are taken, so it says something only between "
                "chance and ceiling.",
            ),
        ),
        (
            Table(
                "Means over the seeds that count. Similarity in brackets: heads renamed, two bases, ceiling. Overlap "
                "at the size of the base's circuit; in brackets chance with as many nodes of each layer. Corrected: 0 "
                "is that chance; in brackets the ceiling. Edges: relative change without the noise; shares of strong "
                "edges that flipped their sign, fell under half or are new, in brackets what noise alone does. CKA: "
                "unbiased, mean over layers. Relearning: gradient steps on old examples until the old task is back, "
                "and the share of the base's own first steps that this saves, over the seeds that regained it.",
                (
                    "Arm",
                    "Seeds",
                    "Cosine",
                    "Rank correlation",
                    "Overlap",
                    "Corrected",
                    "Change",
                    "Flipped",
                    "Weakened",
                    "New",
                    "CKA",
                    "Steps",
                    "Savings",
                ),
                rows,
                1,
            ),
        ),
    )


def _distance(summary: Mapping[str, Any]) -> Section:
    adjustment = summary["adjustment"][0]
    families = "; ".join(
        f"{name}: {', '.join(label(arm) for arm in arms) or 'none'}" for name, arms in adjustment["families"].items()
    )
    distance = short_name(adjustment["distance"])
    effects = [
        (
            " − ".join(label(name) for name in e["name"].split(" − ")),
            e["adjusted_why_not"] or "",
            str(e["n"]),
            number(e["raw_effect"], signed=True),
            number(e["adjusted_effect"], signed=True),
            _interval(e["adjusted_ci"]),
            *(_r2(e[key]) for key in ("raw_r2", "distance_r2", "adjusted_r2")),
        )
        for e in (adjustment["effects"][0], *adjustment["by_reference"], *adjustment["effects"][1:])
    ]
    predictors = [
        (
            short_name(e["measure"]),
            e["why_not"] or "",
            str(e["n"]),
            number(e["effect"], signed=True),
            _interval(e["ci"]),
            _r2(e["r2"]),
        )
        for e in adjustment["predictors"]
    ]
    percent = f"{100 * summary['plan'][0]['confidence']:g} %"
    return Section(
        "Forgetting against distance",
        adjustment["sentences"],
        (
            Picture(
                "forgetting",
                "Arms at the same distance from the base are compared by looking straight up: left, "
                "distance in outputs on new-task prompts; right, distance in weights, with a random "
                "direction as the control. Thin lines are seeds, thick ones their means, marks the matched "
                "models. One learning rate, the one that arms are matched at.",
            ),
        ),
        (
            Table(
                f"Does the method matter at the same distance? {short_name(adjustment['outcome'])} of the matched "
                f"models by method and {distance}, in a linear model with the seed as block ({families}; a family is "
                "the mean of its arms). The distance is itself an outcome of the method, so this says what goes "
                "together. R2 is of seeds that were not fitted: 0 is guessing that all arms of a "
                "seed are alike, and it is negative where the model does worse.",
                (
                    "Methods",
                    "Not estimable because",
                    "Seeds",
                    "Difference",
                    "Adjusted",
                    f"{percent} interval",
                    "R2, method",
                    "distance",
                    "both",
                ),
                effects,
                2,
            ),
            Table(
                f"What predicts the loss of {short_name(adjustment['forgetting'])}? One line for each predictor, over "
                "all arms, with the seed as block; the interval takes the models of a seed for independent. R2 as "
                "above.",
                ("Predictor", "Not estimable because", "Models", "Slope", f"{percent} interval", "R2"),
                predictors,
                2,
            ),
        ),
    )


def _r2(value: float | None) -> str:
    return "below −1" if value is not None and value < -1 else number(value, 2)


def _transplants(summary: Mapping[str, Any]) -> Section:
    entries = summary["table_inputs"]
    columns = [name for name in ("q", "k", "v", "outputs") if entries and name in entries[0]]
    inputs = Table(
        "Which input of the heads of the base's circuit carries what changed? Accuracy of the base with the tuned "
        "model's q (at the heads' own positions), k or v (at every token, since heads read them anywhere), or outputs, "
        "of the whole circuit: the lower, the more of the damage it carries. Means over the seeds that count in the "
        "contrasts, with t intervals; without random heads.",
        ("Arm", "Seeds", "Base", *(f"with {name}" for name in columns), "Tuned model"),
        [
            (
                label(e["arm"]),
                str(e["seeds"]),
                number(e["base"]["mean"]),
                *(_mean_interval(e[name]) for name in columns),
                number(e["tuned"]["mean"]),
            )
            for e in entries
        ],
    )
    without = "The heads' q, k and v were not transplanted (cmap.inputs), so no table says which of them carries it."
    return Section(
        "Transplants",
        () if entries else (without,),
        (
            Picture(
                "transplants",
                "Cross-model activation patching, by group of heads and for the whole circuit. Above: a "
                "bar below the black tick (the base alone) means that tuned heads no longer do the base's "
                "work. Below: a bar above the black tick (the tuned model alone) means that the base's "
                "heads bring back what tuning damaged; the dashed line is the base, the ceiling. Diamonds: "
                "as many random heads instead.",
            ),
        ),
        (inputs,) if entries else (),
    )


def _carried(summary: Mapping[str, Any]) -> Section:
    asked = summary["table_desiderata_of_base"]
    groups = sorted({group for entry in asked for group in entry["accuracy"]})
    rows = [
        (
            entry["desideratum"],
            *(number(entry["accuracy"].get(group)) for group in groups),
            number(entry["floor"]),
            number(entry["random"]),
        )
        for entry in asked
    ]
    masks = [
        (label(e["arm"]), str(e["masks"]), *(number(e[key]) for key in ("share", "chance", "ceiling")))
        for e in summary["table_masks"]
    ]
    same_heads = Table(
        "Do the same heads carry it? Masks that select some but not all heads of a group and move at least half of "
        "the base's answers: share of their heads that are also among as many strongest heads of the tuned model's "
        "mask, at seeds that reach the level. Chance: as many random heads of the group. Ceiling: two masks of the "
        "base itself, trained on different pairs; a tuned model's mask, trained on the same pairs as the base's, can "
        "pass it.",
        ("Arm", "Masks", "Share", "Chance", "Ceiling"),
        masks,
        1,
    )
    tables = (
        (
            Table(
                "All desiderata that the bases were asked, means over those bases that have the group: share of test "
                "pairs in which swapping the selected heads moves the answer to the target. `next_clause` is a "
                "negative control; a name with a wording behind it has source prompts of that wording, with base "
                "prompts as ever. Floor: nothing swapped. Random: as many random heads at the position where they "
                "move most.",
                ("Desideratum", *groups, "Floor", "Random"),
                rows,
                1,
            ),
        )
        if rows
        else ()
    )
    return Section(
        "What the groups carry",
        (),
        (
            Picture(
                "desiderata",
                "Desiderata-based component masking: share of test pairs in which swapping a group's "
                "selected heads moves the answer as it must if the group carries the place, the object or "
                "the label of the box. Ticks: floor with nothing swapped. Diamonds: as many random heads.",
            ),
        ),
        (same_heads, *tables),
    )


def _learning(summary: Mapping[str, Any]) -> Section:
    rows = [
        (
            label(e["arm"]),
            f"{e['learning_rate']:g}",
            f"{e['reached']} of {e['of']}",
            number(e["mean"]),
        )
        for e in summary["table_learning_rates"]
    ]
    budgets = [
        (
            label(e["arm"]),
            *(str(e[name]) for name in ("steps", "answers", "tokens")),
            *(number(e[f"{name}_to_level"], 0) for name in ("steps", "answers", "tokens")),
        )
        for e in summary["table_budgets"]
    ]
    tables = (
        (
            Table(
                "Budgets: equal in gradient steps and in the prompts of a step; of a whole run, and up to the "
                "checkpoints that are compared (means over seeds). Answers are what is learned from, the rollouts of "
                "RL arms. Tokens count every answer with a prompt of its own, though all answers of a prompt are "
                "computed in one pass here.",
                ("Arm", "Steps", "Answers", "Tokens", "Steps to the level", "Answers", "Tokens"),
                budgets,
                1,
            ),
            Table(
                "Old-task accuracy (selection split) where the matching level is reached, for every "
                "learning rate of the grid: how much the learning rate matters beside the method.",
                ("Arm", "Learning rate", "Runs that reach the level", "Old-task accuracy"),
                rows,
                1,
            ),
        )
        if rows
        else ()
    )
    return Section(
        "How they learned",
        (),
        (
            Picture(
                "training",
                "Left: the bases. Right: the arms on the new task (above) and the old one (below); thin "
                "lines are seeds, thick ones their means.",
            ),
        ),
        tables,
    )


def _tables(summary: Mapping[str, Any]) -> Section:
    measures, plan = summary["measures"], summary["plan"][0]
    names = [short_name(measure) for measure in measures]
    models = [
        (
            label(entry["model"]),
            _reach(summary, entry["model"]),
            *(_mean_sd(entry["measures"][measure]) for measure in measures),
        )
        for entry in summary["table_models"]
    ]
    seeds = [
        (
            label(entry["model"]),
            entry["seed"],
            {True: "yes", False: "no", None: "–"}[entry["reached"]],
            "–" if entry["step"] is None else str(entry["step"]),
            *(number(entry["measures"][measure]) for measure in measures),
        )
        for entry in summary["table_seeds"]
    ]
    secondary = [
        (
            short_name(e["measure"]),
            _contrast_name(e),
            str(e["n"]),
            number(e["difference"], signed=True),
            _interval(e["ci"]),
            number(e["p"], 4),
        )
        for e in summary["table_contrasts"]
        if e["measure"] != plan["primary"]
    ]
    return Section(
        "Tables",
        (),
        (),
        (
            Table(
                "Means over the seeds that count in the contrasts, ± standard deviation between seeds.",
                ("Model", "Reached", *names),
                models,
                1,
            ),
            Table("Every seed.", ("Model", "Seed", "Reached", "Step", *names), seeds, 1),
            Table(
                "Contrasts of secondary measures; these describe, their p values are not corrected.",
                ("Measure", "Contrast", "Pairs", "Difference", "t interval", "Exact p"),
                secondary,
                2,
            ),
        ),
    )


def _left_out(summary: Mapping[str, Any]) -> Section:
    plan = summary["plan"][0]
    names = {model["model"]: label(model["model"]) for model in summary["table_models"]}
    lines = []
    for entry in summary["table_contrasts"]:
        if entry["measure"] == plan["primary"] and entry["excluded"]:
            lines.append(
                f"{entry['name']}: {count(len(entry['excluded']), 'pair')} left out ({reasons(entry, names)})."
            )
    if bases := left_out(summary["bases_left_out"]):
        lines.insert(
            0,
            f"{bases} A circuit that does not work in the base cannot say what fine-tuning keeps, so a seed counts "
            f"only where the base circuit reaches at least {plan['base_faithfulness']:g} of the model.",
        )
    elif not lines:
        lines.append("No pair of the primary contrasts was left out.")
    unreached = _cell_list(summary["unreached"])
    lines.append(f"Matching level not reached: {unreached}." if unreached else "Every run reached the matching level.")
    hidden = _cell_list(summary["not_identifiable"])
    lines.append(
        f"Circuit not identifiable, because the model is too close to chance in the old task: {hidden}."
        if hidden
        else "A circuit was identifiable in every model."
    )
    lines.append(
        "Limits: one small architecture, one pair of tasks, attention heads only (MLPs, embeddings and "
        "norms always count as part of a circuit). Whether an arm reaches the level is itself an outcome, "
        "so comparing only those that do can bias a contrast; the reach rates above say how much room "
        "there is for that. What holds here need not hold in large models."
    )
    return Section("What was left out, and what this cannot say", lines)


def _provenance(summary: Mapping[str, Any]) -> Section:
    found = summary["provenance"]
    return Section(
        "Provenance",
        (
            "Computed on the CPU, models in float32, statistics in float64; same params, same bytes. The "
            "hash of a stage is the MD5 of the list of its records' MD5 sums, which are those of dvc.lock "
            "where an output is one file; summary.json lists them all.",
        ),
        (),
        (
            Table("Settings.", ("Name", "Value"), [(e["name"], e["value"]) for e in found["settings"]], 2),
            Table(
                "Packages.",
                ("Package", "Version"),
                [(e["package"], e["version"]) for e in found["versions"]],
                2,
            ),
            Table(
                "Records read.",
                ("Stage", "MD5", "Files"),
                [(e["stage"], e["md5"], str(e["files"])) for e in found["stages"]],
                2,
            ),
        ),
        folded=True,
    )


def _cell_list(entries: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(f"{label(entry['model'])} at seed {entry['seed']}" for entry in entries)


def _reach(summary: Mapping[str, Any], model: str) -> str:
    arm = summary["arms"].get(model)
    return "–" if arm is None else f"{arm['reached']} of {arm['of']}"


def _mean_sd(entry: Mapping[str, Any]) -> str:
    return number(entry["mean"]) if entry["sd"] is None else f"{number(entry['mean'])} ± {number(entry['sd'])}"


def _interval(bounds: Sequence[float] | None, signed: bool = True) -> str:
    return "–" if bounds is None else f"{number(bounds[0], signed=signed)} to {number(bounds[1], signed=signed)}"


def to_html(report: Document, images: Mapping[str, bytes]) -> str:
    """One self-contained page: images are inlined, nothing is fetched, nothing runs.

    Args:
        report: what to say.
        images: figure name -> PNG.
    """
    inlined = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in images.items()}
    return _render("report.html.jinja", report, inlined, escape=True)


def to_markdown(report: Document, images: Mapping[str, bytes]) -> str:
    """The same for a repository page, with images in figures/ beside it."""
    return _render("report.md.jinja", report, {name: f"figures/{name}.png" for name in images}, escape=False)


def _render(template: str, report: Document, images: Mapping[str, str], escape: bool) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(report=report, images=images)
