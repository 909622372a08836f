"""Similarity: is the tuned model's circuit the base's, in edges, strongest heads and activations?"""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Picture, Section, Table
from stages.figures.style import label
from stages.statistics.wording import count, number


def section(summary: Mapping[str, Any]) -> Section:
    """How alike the circuits of base and tuned model are, between chance and ceiling."""
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
