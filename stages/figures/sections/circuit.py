"""The circuit: where it lies in the base, how well it works alone, whether it is minimal and complete."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.style import label
from stages.statistics.wording import SCORES, count, number


def section(summary: Mapping[str, Any]) -> Section:
    """The base's circuit, drawn, and what was asked of it."""
    base = summary["base"]
    clauses = base["queried_clause_faithfulness"] is not None
    of_clauses = (
        "A head at a token of a clause stands before the query and cannot know which clause will be asked for, "
        "so a circuit's head is kept at that token of every clause, and removed or transplanted there. Kept in the "
        "queried clause alone, as in Prakash et al., the circuits reach "
        f"{number(base['queried_clause_faithfulness'])}."
    )
    control = "The last panel is the control, a clause that was not asked for. " if clauses else ""
    return Section(
        "The circuit",
        (
            f"Means over {count(base['seeds'], 'base')}: old-task accuracy {number(base['old_accuracy'])}, "
            f"circuit of {number(base['circuit_size'], 1)} (head, position) nodes, faithfulness "
            f"{number(base['circuit_faithfulness'])}; random circuits of the same shape have "
            f"{number(base['random_faithfulness'])} (at most {number(base['random_faithfulness_max'])}).",
            *summary["idle_findings"],
            *((of_clauses,) if clauses else ()),
            *summary["precision_findings"],
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
                f"seen in any layer. {control}Where a tuned model falls with the base, it still uses the same path.",
            ),
        ),
        (_circuit_tests(summary),),
    )


def _circuit_tests(summary: Mapping[str, Any]) -> Table:
    score = summary["circuits_judged_by"]
    said, unit = SCORES[score], ", as a share of the whole model's" if score == "logit_difference" else ""
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
        f"not missed (idle), with the share of the circuit's {said} that the core keeps. Complete: how far "
        f"apart circuit and model are in {said}{unit} when the same heads are taken out of both, on average "
        "over groups and over random sets, and for the worst set that was found; 0 is complete. CPR and CMD "
        f"are the areas under the size curve and between it and 1, in {said}; enough is the number of nodes "
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
