"""Contexts, which object is in which box, and the splits that they belong to.

A context belongs to exactly one split, by a hash of what is in it. So splits are disjoint by construction,
whoever draws them, whenever, with whatever seed; a draw that lands in another split is drawn again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Int

from stages.pipeline.stage import Invalid
from stages.tasks.vocabulary import EVERY_WORD, OBJECTS, Pool


class Split(StrEnum):
    """What a context may be used for."""

    TRAIN = "train"  # pretraining and fine-tuning
    SELECTION = "selection"  # choosing checkpoints, levels and masks
    DISCOVERY = "discovery"  # finding circuits, training masks
    PRUNING = "pruning"  # pruning circuits, mean activations
    EVALUATION = "evaluation"  # numbers that are reported
    RELEARNING = "relearning"  # relearning savings


SPLITS = tuple(Split)
# Of 64 hash values, the first 24 are the train split, and each other split has 8.
_HASH_VALUES = 64
_SPLIT_OF_VALUE = np.array([0] * 24 + [split for split in range(1, 6) for _ in range(8)])


@dataclass(frozen=True)
class Contexts:
    """Boxes with their contents, clause by clause.

    Attributes:
        objects: index into OBJECTS of the object that each clause names; distinct in a row.
        labels: index into LABELS of its box; distinct in a row.
    """

    objects: Int[np.ndarray, "n boxes"]
    labels: Int[np.ndarray, "n boxes"]

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def boxes(self) -> int:
        return self.objects.shape[1]

    def select(self, index: np.ndarray) -> "Contexts":
        return Contexts(self.objects[index], self.labels[index])


def splits(contexts: Contexts) -> Int[np.ndarray, "n"]:
    """Index into SPLITS of the one split of each context."""
    return hashed_splits(np.concatenate([contexts.objects, contexts.labels + len(OBJECTS)], axis=1), contexts.boxes)


def hashed_splits(rows: Int[np.ndarray, "n columns"], salt: int) -> Int[np.ndarray, "n"]:
    """Index into SPLITS of the one split of each row of numbers, by a hash of them in this order."""
    state = np.full(len(rows), salt, dtype=np.uint64)
    for column in rows.T:
        state = _mix(state ^ _mix(column.astype(np.uint64) + np.uint64(1)))
    return _SPLIT_OF_VALUE[(state % np.uint64(_HASH_VALUES)).astype(np.int64)]


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def draw_contexts(
    rng: np.random.Generator,
    split: Split,
    n: int,
    boxes: int,
    without_objects: Int[np.ndarray, "n used"] | None = None,
    without_labels: Int[np.ndarray, "n unused"] | None = None,
    fixed: Callable[[Contexts], Contexts] | None = None,
    pool: Pool = EVERY_WORD,
) -> Contexts:
    """Draw contexts of one split, uniformly.

    Args:
        rng: source of randomness.
        split: the split that all of them belong to.
        n: number of contexts.
        boxes: number of clauses.
        without_objects: objects (indices) that row i must not name.
        without_labels: labels (indices) that row i must not use.
        fixed: edits all n rows, drawn or kept, before their split is looked up; it must be a function of the
            row's own content and place only.
        pool: the objects and labels that any row may use.

    Raises:
        Invalid: too few objects or labels are left for that many boxes.
    """
    objects_left = int(pool.objects.sum()) - (0 if without_objects is None else without_objects.shape[1])
    labels_left = int(pool.labels.sum()) - (0 if without_labels is None else without_labels.shape[1])
    if boxes > objects_left or boxes > labels_left:
        raise Invalid(
            f"boxes = {boxes}: {objects_left} objects and {labels_left} labels are left: must be fewer boxes, or a "
            "tokenizer that has more of these words as one token"
        )
    objects, labels = np.empty((n, boxes), np.int64), np.empty((n, boxes), np.int64)
    todo = np.arange(n)
    while len(todo):
        objects[todo] = _distinct(rng, pool.objects, boxes, len(todo), _rows(without_objects, todo))
        labels[todo] = _distinct(rng, pool.labels, boxes, len(todo), _rows(without_labels, todo))
        contexts = Contexts(objects, labels)
        if fixed is not None:
            contexts = fixed(contexts)
            objects, labels = contexts.objects, contexts.labels
        todo = np.flatnonzero(splits(contexts) != SPLITS.index(split))
    return Contexts(objects, labels)


def draw_absent_label(rng: np.random.Generator, *contexts: Contexts, pool: Pool = EVERY_WORD) -> Int[np.ndarray, "n"]:
    """One label (index) of the pool per row that none of the contexts of that row uses."""
    present = np.concatenate([c.labels for c in contexts], axis=1)
    return _distinct(rng, pool.labels, 1, len(present), present)[:, 0]


def draw_clauses(rng: np.random.Generator, n: int, clauses: int) -> Int[np.ndarray, "n"]:
    """A clause index per row: every clause equally often (up to one), in random order."""
    return rng.permutation(np.arange(n) % clauses)


def draw_other_clauses(rng: np.random.Generator, boxes: int, *taken: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """A clause index per row that differs from all taken ones, uniform over the rest."""
    keys = rng.random((len(taken[0]), boxes))
    for clause in taken:
        keys[np.arange(len(keys)), clause] = 2.0
    return keys.argmin(axis=1)


def _distinct(
    rng: np.random.Generator, of: Bool[np.ndarray, "values"], k: int, n: int, without: Int[np.ndarray, "n m"] | None
) -> Int[np.ndarray, "n k"]:
    """k distinct values per row of those that `of` marks, in random order, none of the row's `without`."""
    keys = rng.random((n, len(of)))
    keys[:, ~of] = 2.0
    if without is not None:
        np.put_along_axis(keys, without, 2.0, axis=1)  # sorts last
    return np.argsort(keys, axis=1)[:, :k]


def _rows(values: np.ndarray | None, index: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[index]


def contains_label(contexts: Contexts, label: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Whether each context uses the label."""
    return (contexts.labels == label[:, None]).any(axis=1)
