"""What a query may ask of a box: the old task `contains` and the new tasks, one registry line each.

All of them share the context and the form of the query, `Box L <verb> the`; a relation says which clauses
hold a right answer. So a new task differs from the old one in one token, and its shortcuts can be scored
(`shortcuts.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from stages.tasks.contexts import Contexts, Split, draw_clauses, draw_contexts
from stages.tasks.examples import Prompts
from stages.tasks.templates import STANDARD, context_pattern, render
from stages.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class Relation:
    """A query verb and its right answers.

    Attributes:
        verb: the word between the label and the last token.
        valid: (number of boxes, queried clause) -> clauses whose objects are right, the canonical one first;
            none if that clause is never queried.
    """

    verb: str
    valid: Callable[[int, int], tuple[int, ...]]


def _neighbours(boxes: int, clause: int) -> tuple[int, ...]:
    around = ((clause + 1) % boxes, (clause - 1) % boxes)
    return tuple(dict.fromkeys(other for other in around if other != clause))


def _others(boxes: int, clause: int) -> tuple[int, ...]:
    return tuple(other for other in range(boxes) if other != clause)


def _next(boxes: int, clause: int) -> tuple[int, ...]:
    return (clause + 1,) if clause + 1 < boxes else ()


CONTAINS = Relation("contains", lambda boxes, clause: (clause,))
NEW_TASKS = {
    "adjacent": Relation("adjoins", _neighbours),  # either neighbour, in a circle: 2 right answers of 7
    "lacks": Relation("lacks", _others),  # any other object: 6 of 7, so naming any object scores .857
    "precedes": Relation("precedes", _next),  # the next clause's object: 1 of 7; the last clause is not queried
    "contains": CONTAINS,  # the old task itself, for a base that still has something of it to learn
}


def query_words(clause: int, verb: str) -> tuple[str, ...]:
    """The query that follows a context, up to and without its answer."""
    return ("Box", f"l{clause}", verb, "the")


def target_weights(relation: Relation, boxes: int, own: float) -> Float[np.ndarray, "boxes boxes"]:
    """For each queried clause (row), the target probability of each clause's object.

    Args:
        relation: its right answers share 1 - own evenly.
        boxes: number of clauses.
        own: probability of the object in the queried box itself.

    Returns:
        rows that sum to 1, or to 0 where the clause is never queried.
    """
    weights = np.zeros((boxes, boxes))
    for clause in range(boxes):
        valid = relation.valid(boxes, clause)
        if valid:
            weights[clause, list(valid)] = (1 - own) / len(valid)
            weights[clause, clause] += own
    return weights


def draw_prompts(
    rng: np.random.Generator, vocabulary: Vocabulary, relation: Relation, split: Split, n: int, boxes: int
) -> Prompts:
    """Draw prompts of one new task, standard template; each clause that can be queried equally often."""
    contexts = draw_contexts(rng, split, n, boxes)
    queried = [clause for clause in range(boxes) if relation.valid(boxes, clause)]
    clauses = np.array(queried)[draw_clauses(rng, n, len(queried))]
    return make_prompts(vocabulary, relation, contexts, clauses)


def make_prompts(
    vocabulary: Vocabulary, relation: Relation, contexts: Contexts, clauses: Int[np.ndarray, "n"]
) -> Prompts:
    """Prompts of one new task for given contexts and queried clauses."""
    boxes = contexts.boxes
    objects = vocabulary.objects[contexts.objects]
    valid = np.full((len(contexts), max(len(relation.valid(boxes, c)) for c in range(boxes))), -1)
    for clause in range(boxes):
        rows = clauses == clause
        right = list(relation.valid(boxes, clause))
        valid[rows, : len(right)] = objects[rows][:, right]
    ids = render_queries(vocabulary, STANDARD, contexts, clauses, relation.verb)
    return Prompts.from_numpy(ids, valid, valid[:, 0].copy(), objects)


def render_queries(
    vocabulary: Vocabulary,
    template: str,
    contexts: Contexts,
    clauses: Int[np.ndarray, "n"],
    verb: str,
    extra_label: Int[np.ndarray, "n"] | None = None,
    query_labels: Int[np.ndarray, "n"] | None = None,
) -> Int[np.ndarray, "n t"]:
    """Token ids of contexts with one query each.

    Args:
        vocabulary: token ids of words.
        template: how the context is said; all its patterns must be equally long.
        contexts: the contexts.
        clauses: the queried clause of each.
        verb: the query's verb.
        extra_label: label (index) for templates with a box of their own.
        query_labels: label (index) to ask for instead of the queried clause's.
    """
    rows: list[np.ndarray] = []
    order: list[np.ndarray] = []
    for clause in np.unique(clauses):
        index = np.flatnonzero(clauses == clause)
        words = context_pattern(template, contexts.boxes, int(clause)).words + query_words(int(clause), verb)
        extra = None if extra_label is None else extra_label[index]
        rows.append(render(vocabulary, words, contexts.select(index), extra))
        order.append(index)
    ids = np.concatenate(rows)[np.argsort(np.concatenate(order), kind="stable")]
    if query_labels is not None:
        ids[:, -3] = vocabulary.labels[query_labels]
    return ids
