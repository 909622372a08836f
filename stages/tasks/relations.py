"""What a query may ask of a box: the old task `contains` and the new tasks, one registry line each.

All of them share the context and the form of the query, `Box L <verb> the`; a relation says which clauses
hold a right answer. So a new task differs from the old one in one word, which is one token where the tokenizer has one
for any of the words that say it, and its shortcuts can be scored (`shortcuts.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Contexts, Split, draw_clauses, draw_contexts
from stages.tasks.examples import Prompts
from stages.tasks.templates import STANDARD, context_pattern, places, render
from stages.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class Relation:
    """A query verb and its right answers.

    Attributes:
        verbs: words that may stand between the label and the last token, the preferred one first.
        valid: (number of boxes, queried clause) -> clauses whose objects are right, the canonical one first;
            none if that clause is never queried.
    """

    verbs: tuple[str, ...]
    valid: Callable[[int, int], tuple[int, ...]]

    def verb(self, vocabulary: Vocabulary) -> str:
        """The first of the verbs that is one token.

        Raises:
            Invalid: none is, so that prompts would not be as long as those of the old task.
        """
        for verb in self.verbs:
            if vocabulary.is_one_token(verb):
                return verb
        raise Invalid(f"the tokenizer has no token for any of the verbs {', '.join(self.verbs)}: must have one")


def _neighbours(boxes: int, clause: int) -> tuple[int, ...]:
    around = ((clause + 1) % boxes, (clause - 1) % boxes)
    return tuple(dict.fromkeys(other for other in around if other != clause))


def _others(boxes: int, clause: int) -> tuple[int, ...]:
    return tuple(other for other in range(boxes) if other != clause)


def _next(boxes: int, clause: int) -> tuple[int, ...]:
    return (clause + 1,) if clause + 1 < boxes else ()


CONTAINS = Relation(("contains", "holds", "has"), lambda boxes, clause: (clause,))
RELATIONS = {
    # either neighbour, in a circle: 2 right answers of 7
    "adjacent": Relation(("adjoins", "borders", "touches", "meets"), _neighbours),
    # any other object: 6 of 7, so naming any object scores .857
    "lacks": Relation(("lacks", "misses"), _others),
    # the next clause's object: 1 of 7; the last clause is not queried
    "precedes": Relation(("precedes", "leads"), _next),
    # the old task itself, for a base that still has something of it to learn
    "contains": CONTAINS,
}

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
    ids = render_queries(vocabulary, STANDARD, contexts, clauses, relation.verb(vocabulary))
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
