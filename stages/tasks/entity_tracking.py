"""The old task: which object is in a box (Prakash et al., ICLR 2024, section 2).

    <bos> The fan is in Box Z, the cross is in Box J, ... . Box Z contains the   ->   fan

With 7 boxes a prompt has 54 tokens, where every word is one and `<bos>` in front: 1 + 7 x 7 + 4.
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
from stages.tasks.examples import Examples
from stages.tasks.new.contains import TASK as CONTAINS
from stages.tasks.relations import QUERY_LABEL, query_words, render_queries
from stages.tasks.templates import STANDARD, context_pattern, places
from stages.tasks.vocabulary import Vocabulary

# the last token, the label in the query, and label, object and separator of the queried clause
POSITIONS = ("last", "query_label", "earlier_label", "earlier_object", "earlier_separator")
CLAUSE_POSITIONS = POSITIONS[2:]


def draw_examples(
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    split: Split,
    n: int,
    boxes: int,
    random_query: bool = False,
) -> Examples:
    """Draw examples with corrupt partners of the same split: another context, without a shared object, that asks for a
    box of neither. Its positions inside a clause are those of a random clause other than the clean one.

    Args:
        rng: source of randomness.
        vocabulary: token ids of words.
        split: the split that clean and corrupt contexts belong to.
        n: number of examples.
        boxes: number of clauses.
        random_query: ask for a random letter instead of the queried clause's label, as prompts for mean
            ablation do; the answer and the "earlier" positions are still those of the queried clause.
    """
    pool = vocabulary.pool
    clean = draw_contexts(rng, split, n, boxes, pool=pool)
    clauses = draw_clauses(rng, n, boxes)
    query_label = draw_absent_label(rng, clean, pool=pool)  # the corrupt query: a box of neither context
    corrupt = draw_contexts(rng, split, n, boxes, clean.objects, query_label[:, None], pool=pool)
    corrupt_clauses = draw_other_clauses(rng, boxes, clauses)
    labels = np.flatnonzero(pool.labels)
    letters = labels[rng.integers(len(labels), size=n)] if random_query else None

    objects = vocabulary.objects[clean.objects]
    rows = np.arange(n)
    others = np.ones_like(objects, dtype=bool)
    others[rows, clauses] = False
    ids = render_queries(vocabulary, STANDARD, clean, clauses, CONTAINS.sign(vocabulary), query_labels=letters)
    corrupt_ids = render_queries(
        vocabulary, STANDARD, corrupt, corrupt_clauses, CONTAINS.sign(vocabulary), query_labels=query_label
    )
    return Examples(
        torch.from_numpy(ids),
        torch.from_numpy(objects[rows, clauses]),
        torch.from_numpy(objects[others].reshape(n, boxes - 1)),
        positions(vocabulary, boxes, clauses),
        every_clause(vocabulary, boxes, n),
        torch.from_numpy(corrupt_ids),
        positions(vocabulary, boxes, corrupt_clauses),
    )


def positions(
    vocabulary: Vocabulary, boxes: int, clauses: Int[np.ndarray, "n"], template: str = STANDARD
) -> dict[str, Int[Tensor, "n"]]:
    """Index of every semantic position in prompts of a template that query these clauses: its first token, where it is
    a word of several, and the last one of the prompt."""
    at = np.empty((boxes, len(POSITIONS)), np.int64)
    for clause in range(boxes):
        pattern = context_pattern(template, boxes, clause)
        first = places(vocabulary, pattern.words + query_words(clause, CONTAINS.sign(vocabulary)))
        label, obj, separator = (first[of[clause]] for of in (pattern.labels, pattern.objects, pattern.separators))
        at[clause] = first[-1] - 1, first[len(pattern) + QUERY_LABEL], label, obj, separator
    return {name: torch.from_numpy(at[clauses, number]) for number, name in enumerate(POSITIONS)}


def every_clause(vocabulary: Vocabulary, boxes: int, n: int) -> dict[str, Int[Tensor, "n boxes"]]:
    """Indices, in standard prompts, of every semantic position inside a clause: those of all clauses."""
    each = positions(vocabulary, boxes, np.arange(boxes))
    return {name: each[name].expand(n, boxes) for name in CLAUSE_POSITIONS}


def old_prompts(
    vocabulary: Vocabulary,
    contexts: Contexts,
    clauses: Int[np.ndarray, "n"],
    template: str = STANDARD,
    extra_label: Int[np.ndarray, "n"] | None = None,
) -> Int[Tensor, "n t"]:
    """Prompts of a template that query these clauses; `extra_label` is the label of a box that it adds."""
    return torch.from_numpy(
        render_queries(vocabulary, template, contexts, clauses, CONTAINS.sign(vocabulary), extra_label)
    )


def draw_queries(
    rng: np.random.Generator, vocabulary: Vocabulary, template: str, split: Split, n: int, boxes: int
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n"]]:
    """Prompts with one `contains` query in any template, and their answers, to test a model with."""
    contexts = draw_contexts(rng, split, n, boxes, pool=vocabulary.pool)
    clauses = draw_clauses(rng, n, boxes)
    extra = draw_absent_label(rng, contexts, pool=vocabulary.pool)
    ids = render_queries(vocabulary, template, contexts, clauses, CONTAINS.sign(vocabulary), extra_label=extra)
    answers = vocabulary.objects[contexts.objects][np.arange(n), clauses]
    return torch.from_numpy(ids), torch.from_numpy(answers)
