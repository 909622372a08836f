"""The old task: which object is in a box (Prakash et al., ICLR 2024, section 2).

    <bos> The fan is in Box Z, the cross is in Box J, ... . Box Z contains the   ->   fan

With 7 boxes a prompt has 54 tokens: 1 + 7 x 7 + 4.
"""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from stages.tasks.contexts import (
    Contexts,
    Split,
    draw_absent_label,
    draw_clauses,
    draw_contexts,
    draw_other_clauses,
)
from stages.tasks.examples import CLAUSE_POSITIONS, POSITIONS, Examples
from stages.tasks.relations import CONTAINS, render_queries
from stages.tasks.templates import STANDARD, context_pattern
from stages.tasks.vocabulary import LABELS, Vocabulary


def draw_examples(
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    split: Split,
    n: int,
    boxes: int,
    random_query: bool = False,
) -> Examples:
    """Draw examples with corrupt partners of the same split.

    Args:
        rng: source of randomness.
        vocabulary: token ids of words.
        split: the split that clean and corrupt contexts belong to.
        n: number of examples.
        boxes: number of clauses.
        random_query: ask for a random letter instead of the queried clause's label, as prompts for mean
            ablation do; the answer and the "earlier" positions are still those of the queried clause.
    """
    clean = draw_contexts(rng, split, n, boxes)
    clauses = draw_clauses(rng, n, boxes)
    query_label = draw_absent_label(rng, clean)  # the corrupt query: a box of neither context
    corrupt = draw_contexts(rng, split, n, boxes, clean.objects, query_label[:, None])
    corrupt_clauses = draw_other_clauses(rng, boxes, clauses)
    letters = rng.integers(len(LABELS), size=n) if random_query else None

    objects = vocabulary.objects[clean.objects]
    rows = np.arange(n)
    others = np.ones_like(objects, dtype=bool)
    others[rows, clauses] = False
    ids = render_queries(vocabulary, STANDARD, clean, clauses, CONTAINS.verb, query_labels=letters)
    corrupt_ids = render_queries(
        vocabulary, STANDARD, corrupt, corrupt_clauses, CONTAINS.verb, query_labels=query_label
    )
    return Examples(
        torch.from_numpy(ids),
        torch.from_numpy(objects[rows, clauses]),
        torch.from_numpy(objects[others].reshape(n, boxes - 1)),
        positions(boxes, clauses),
        every_clause(boxes, n),
        torch.from_numpy(corrupt_ids),
        positions(boxes, corrupt_clauses),
    )


def positions(boxes: int, clauses: Int[np.ndarray, "n"], template: str = STANDARD) -> dict[str, Int[Tensor, "n"]]:
    """Index of every semantic position in prompts of a template that query these clauses."""
    patterns = [context_pattern(template, boxes, clause) for clause in range(boxes)]
    last = np.array([len(pattern) + 3 for pattern in patterns])
    at = {
        "last": last,
        "query_label": last - 2,
        "earlier_label": np.array([pattern.labels[clause] for clause, pattern in enumerate(patterns)]),
        "earlier_object": np.array([pattern.objects[clause] for clause, pattern in enumerate(patterns)]),
        "earlier_separator": np.array([pattern.separators[clause] for clause, pattern in enumerate(patterns)]),
    }
    return {name: torch.from_numpy(at[name][clauses]) for name in POSITIONS}


def every_clause(boxes: int, n: int) -> dict[str, Int[Tensor, "n boxes"]]:
    """Indices, in standard prompts, of every semantic position inside a clause: those of all clauses."""
    each = positions(boxes, np.arange(boxes))
    return {name: each[name].expand(n, boxes) for name in CLAUSE_POSITIONS}


def old_prompts(
    vocabulary: Vocabulary,
    contexts: Contexts,
    clauses: Int[np.ndarray, "n"],
    template: str = STANDARD,
    extra_label: Int[np.ndarray, "n"] | None = None,
) -> Int[Tensor, "n t"]:
    """Prompts of a template that query these clauses; `extra_label` is the label of a box that it adds."""
    return torch.from_numpy(render_queries(vocabulary, template, contexts, clauses, CONTAINS.verb, extra_label))
