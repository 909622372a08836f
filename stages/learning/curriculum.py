"""What the base is trained on: batches of contexts with queries, phase by phase.

1. A row is a random string said twice, or a context in one of the templates followed by one query for every
   box: `... . Box J contains the cross. Box Z adjoins the cross. ...`, in random order. Asking for every box
   gives seven times the signal of one query a context.
2. Each query carries a soft target over the objects of its context. `contains` puts 1 - spread on the right
   object and spreads the rest, so that its probability settles there instead of saturating (a saturated model
   has no effects to measure). A new task puts a part on the box's own object, so that the base knows the task
   a little but not well. `arithmetic` has no boxes to be asked for; its sums are rows of their own, and the part on
   a wrong answer goes to the first number of each.
3. A phase (`Phase`) says which rows and queries are drawn; `pretraining.py` moves from one to the next.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.tasks.arithmetic import QUESTION, SOLVED, draw_sums, prompt_tokens, render_sums
from stages.tasks.contexts import Contexts, Split, draw_absent_label, draw_contexts
from stages.tasks.new.contains import TASK as CONTAINS
from stages.tasks.new_task import Relation
from stages.tasks.new_tasks import RELATIONS
from stages.tasks.relations import query_words, target_weights
from stages.tasks.templates import context_pattern, render
from stages.tasks.vocabulary import BOS, PAD, SPECIAL, WordVocabulary

ARITHMETIC = "arithmetic"  # of the new tasks that a phase shows, the one without boxes


@runtime_checkable
class TaskShare(Protocol):
    """How a new task enters a phase: its share of the queries (of `arithmetic`, of the rows), and the target
    probability of the box's own object (of `arithmetic`, of the first number)."""

    share: float
    own: float


@runtime_checkable
class Phase(Protocol):
    """What the rows of a phase are.

    Attributes:
        repeats: share of rows that are a random string said twice.
        templates: template -> its share of the other rows (normalised).
        boxes: fewest and most boxes of a context.
        most_boxes_share: share of contexts with the most boxes; the rest is uniform over fewest..most.
        spread: target probability of `contains` that goes to the wrong objects of the context.
        tasks: new task -> its part.
    """

    repeats: float
    templates: Mapping[str, float]
    boxes: tuple[int, int]
    most_boxes_share: float
    spread: float
    tasks: Mapping[str, TaskShare]


@dataclass(frozen=True)
class Batch:
    """Token rows, padded on the right, and the places in them that are trained with a target of their own.

    Attributes:
        ids: token ids.
        place: flat index (row * t + column) of each trained prediction: the token before the answer.
        options: token ids among which the target probability is shared.
        weights: target probability of each option.
        lengths: tokens of each row without its padding; never smaller than those of the row before.
    """

    ids: Int[Tensor, "b t"]
    place: Int[Tensor, "m"]
    options: Int[Tensor, "m k"]
    weights: Float[Tensor, "m k"]
    lengths: Int[Tensor, "b"]

    def pieces(self, rows: int) -> Iterator["Batch"]:
        """The batch in pieces of at most so many rows, each padded only as far as it needs."""
        row, column = self.place // self.ids.shape[1], self.place % self.ids.shape[1]
        for start in range(0, len(self.ids), rows):
            lengths = self.lengths[start : start + rows]
            longest = int(lengths[-1])
            here = (row >= start) & (row < start + rows)
            yield Batch(
                self.ids[start : start + rows, :longest],
                (row[here] - start) * longest + column[here],
                self.options[here],
                self.weights[here],
                lengths,
            )


REPEAT_LENGTHS = (
    8,
    23,
)  # of the string that is said twice; shorter than a context, long enough to rule out guessing


def draw_batch(rng: np.random.Generator, vocabulary: WordVocabulary, phase: Phase, rows: int, most_boxes: int) -> Batch:
    """Draw one training batch of the train split.

    Args:
        rng: source of randomness.
        vocabulary: token ids of words.
        phase: what to draw.
        rows: number of rows.
        most_boxes: cap on the number of boxes, whatever the phase says.
    """
    repeats = int((rng.random(rows) < phase.repeats).sum())
    parts = [_repeat(rng, vocabulary) for _ in range(repeats)]
    if ARITHMETIC in phase.tasks:
        task = phase.tasks[ARITHMETIC]
        sums = min(int((rng.random(rows) < task.share).sum()), rows - repeats)
        parts += [_sums(rng, vocabulary, task.own, sums, most_boxes)] if sums else []
        rows -= sums
    names = list(phase.templates)
    shares = np.array([phase.templates[name] for name in names])
    fewest, most = (min(limit, most_boxes) for limit in phase.boxes)
    kinds = rng.choice(len(names), size=rows - repeats, p=shares / shares.sum()) if rows > repeats else np.empty(0)
    sizes = rng.integers(fewest, most + 1, size=rows - repeats)
    sizes[rng.random(rows - repeats) < phase.most_boxes_share] = most
    for boxes in np.unique(sizes):
        contexts = draw_contexts(rng, Split.TRAIN, int((sizes == boxes).sum()), int(boxes))
        for kind in np.unique(kinds[sizes == boxes]):
            chosen = contexts.select(kinds[sizes == boxes] == kind)
            parts.append(_queries(rng, vocabulary, phase, names[int(kind)], chosen))
    return _join(parts, vocabulary.ids[PAD])


@dataclass(frozen=True)
class _Part:
    """Equally long rows of a batch: as Batch, with `place` as (row, column)."""

    ids: Int[np.ndarray, "b t"]
    row: Int[np.ndarray, "m"]
    column: Int[np.ndarray, "m"]
    options: Int[np.ndarray, "m k"]
    weights: Float[np.ndarray, "m k"]


def _repeat(rng: np.random.Generator, vocabulary: WordVocabulary) -> _Part:
    length = int(rng.integers(REPEAT_LENGTHS[0], REPEAT_LENGTHS[1] + 1))
    ids = draw_repeats(rng, vocabulary, 1, length)
    column = np.arange(length + 1, 2 * length)  # predicts the second copy from its second token on
    options = ids[0, column + 1][:, None]
    return _Part(ids, np.zeros_like(column), column, options, np.ones_like(options, dtype=np.float64))


def draw_repeats(
    rng: np.random.Generator, vocabulary: WordVocabulary, rows: int, length: int
) -> Int[np.ndarray, "rows t"]:
    """`<bos>` and a random string of words, said twice."""
    string = rng.integers(len(SPECIAL), len(vocabulary), size=(rows, length))
    return np.concatenate([np.full((rows, 1), vocabulary.ids[BOS]), string, string], axis=1)


def _sums(rng: np.random.Generator, vocabulary: WordVocabulary, own: float, n: int, boxes: int) -> _Part:
    """Prompts of arithmetic, whose every whole sum is trained."""
    tokens = prompt_tokens(boxes)
    sums = draw_sums(rng, Split.TRAIN, n, tokens)
    ids = render_sums(vocabulary, sums, tokens)
    column = np.arange(tokens - 1, QUESTION - 1, -SOLVED)  # every `=` that has its whole question before it
    trained = sums[:, ::-1][:, : len(column)]
    options = vocabulary.numbers[np.stack([trained.sum(axis=2), trained[:, :, 0]], axis=2) - 1]
    return _Part(
        ids,
        np.repeat(np.arange(n), len(column)),
        np.tile(column, n),
        options.reshape(-1, 2),
        np.tile([1 - own, own], (n * len(column), 1)),
    )


def _queries(
    rng: np.random.Generator, vocabulary: WordVocabulary, phase: Phase, template: str, contexts: Contexts
) -> _Part:
    n, boxes = contexts.objects.shape
    objects = vocabulary.objects[contexts.objects]
    tasks = {name: task for name, task in phase.tasks.items() if name != ARITHMETIC}
    relations = [CONTAINS, *(RELATIONS[name] for name in tasks)]
    # contains: spread over the other objects = every object gets spread / (boxes - 1), the right one the rest
    targets = [np.full((boxes, boxes), phase.spread / (boxes - 1))]
    np.fill_diagonal(targets[0], 1 - phase.spread)
    targets += [target_weights(RELATIONS[name], boxes, task.own) for name, task in tasks.items()]
    table = np.stack(targets)  # [relation, queried clause, clause]
    shares = np.array([task.share for task in tasks.values()])

    order = np.argsort(rng.random((n, boxes)), axis=1)  # [n, query]: the clause that each query asks for
    asked = rng.choice(len(relations), size=(n, boxes), p=[1 - shares.sum(), *shares])
    asked[table[asked, order].sum(axis=2) == 0] = 0  # a clause that the new task never asks for
    weights = table[asked, order]  # [n, query, clause]
    # the text goes on with a right answer, never with a wrong one
    said = _right_clauses(rng, relations, order, asked, boxes)
    answers = np.take_along_axis(objects, said, axis=1)

    clause = int(rng.integers(boxes))
    pattern = context_pattern(template, boxes, clause)
    context = render(vocabulary, pattern.words, contexts, draw_absent_label(rng, contexts))
    verbs = np.array([vocabulary.ids[relation.sign(vocabulary)] for relation in relations])[asked]
    labels = np.take_along_axis(vocabulary.labels[contexts.labels], order, axis=1)
    box, the, stop = (np.full((n, boxes), vocabulary.ids[word]) for word in ("Box", "the", "."))
    queries = np.stack([box, labels, verbs, the, answers, stop], axis=2).reshape(n, 6 * boxes)
    column = context.shape[1] + 6 * np.arange(boxes) + len(query_words(0, "")) - 1
    return _Part(
        np.concatenate([context, queries[:, :-1]], axis=1),
        np.repeat(np.arange(n), boxes),
        np.tile(column, n),
        np.repeat(objects, boxes, axis=0),
        weights.reshape(n * boxes, boxes),
    )


def _right_clauses(
    rng: np.random.Generator, relations: list[Relation], order: np.ndarray, asked: np.ndarray, boxes: int
) -> Int[np.ndarray, "n query"]:
    """A random right clause for every query."""
    chosen = order.copy()
    for index, relation in enumerate(relations[1:], start=1):
        for clause in range(boxes):
            valid = relation.valid(boxes, clause)
            if valid:
                here = (asked == index) & (order == clause)
                chosen[here] = rng.choice(valid, size=int(here.sum()))
    return chosen


def _join(parts: list[_Part], pad: int) -> Batch:
    parts = sorted(parts, key=lambda part: part.ids.shape[1])
    lengths = np.repeat([part.ids.shape[1] for part in parts], [len(part.ids) for part in parts])
    rows, longest = sum(len(part.ids) for part in parts), max(part.ids.shape[1] for part in parts)
    predictions = sum(len(part.row) for part in parts)
    widest = max(part.options.shape[1] for part in parts)
    ids = np.full((rows, longest), pad)
    place = np.empty(predictions, np.int64)
    options = np.zeros((predictions, widest), np.int64)
    weights = np.zeros((predictions, widest), np.float32)
    row = start = 0
    for part in parts:
        ids[row : row + len(part.ids), : part.ids.shape[1]] = part.ids
        stop = start + len(part.row)
        place[start:stop] = (row + part.row) * longest + part.column
        options[start:stop, : part.options.shape[1]] = part.options
        weights[start:stop, : part.options.shape[1]] = part.weights
        row, start = row + len(part.ids), stop
    return Batch(*(torch.from_numpy(array) for array in (ids, place, options, weights, lengths)))
