"""Prompts that ask something of a box: the old task and the new tasks that are a `Relation`.

All of them share the context and the form of the query, `Box L <verb> the`; a relation says which clauses
hold a right answer. So a new task differs from the old one in one word, which is one token where the tokenizer has one
for any of the words that say it, and its shortcuts can be scored (`shortcuts.py`).
"""

import numpy as np
from jaxtyping import Float, Int

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Contexts, Split, draw_clauses, draw_contexts
from stages.tasks.examples import Prompts
from stages.tasks.new_task import Relation
from stages.tasks.templates import STANDARD, context_pattern, places, render
from stages.tasks.vocabulary import Vocabulary

QUERY_LABEL = 1  # index of the label in the words of the query


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
    relation: Relation, rng: np.random.Generator, vocabulary: Vocabulary, split: Split, n: int, boxes: int
) -> Prompts:
    """Draw prompts of one new task, standard template; each clause that can be queried equally often."""
    contexts = draw_contexts(rng, split, n, boxes, pool=vocabulary.pool)
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
    ids = render_queries(vocabulary, STANDARD, contexts, clauses, relation.sign(vocabulary))
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
        template: how the context is said.
        contexts: the contexts.
        clauses: the queried clause of each.
        verb: the query's verb.
        extra_label: label (index) for templates with a box of their own.
        query_labels: label (index) to ask for instead of the queried clause's.

    Raises:
        Invalid: prompts that query different clauses are not equally long.
    """
    boxes = contexts.boxes
    rows: list[np.ndarray] = []
    order: list[np.ndarray] = []
    label_at = -1
    for clause in np.unique(clauses):
        index = np.flatnonzero(clauses == clause)
        context = context_pattern(template, boxes, int(clause)).words
        words = context + query_words(int(clause), verb)
        label_at = places(vocabulary, words)[len(context) + QUERY_LABEL]
        extra = None if extra_label is None else extra_label[index]
        rows.append(render(vocabulary, words, contexts.select(index), extra))
        order.append(index)
    lengths = {row.shape[1] for row in rows}
    if len(lengths) > 1:
        raise Invalid(
            f"wording '{template}': prompts of {boxes} boxes have {min(lengths)} to {max(lengths)} tokens, by what is "
            "asked for: must be equally long, as with a tokenizer that has one token for every word"
        )
    ids = np.concatenate(rows)[np.argsort(np.concatenate(order), kind="stable")]
    if query_labels is not None:
        ids[:, label_at] = vocabulary.labels[query_labels]
    return ids
