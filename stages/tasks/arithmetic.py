"""Arithmetic: sums of five small numbers, a new task that shares no box, label or object with the old one.

    <bos> + 2 + 1 = 8 , ... , 3 + 1 + 1 + 2 + 2 = 9 , 1 + 3 + 3 + 2 + 1 =   ->   10

1. A prompt is as long as one of entity tracking with so many boxes, because some arms mix both and no prompt
   may be padded: as many solved sums as fit come before the question, and the first of them is cut off.
2. Which numbers are added, in this order, belongs to exactly one split by a hash. Solved sums are of the train
   split, so no prompt gives away a question of another one.
3. Each question has one right answer. Splits share no question, but the same numbers come in other orders: with
   many numbers of few values, what is learned of the train split holds for the others. With two or three numbers of
   many values, or with sets of numbers kept apart, a small model learns the train split by heart and nothing else.
"""

from functools import cache
from hashlib import sha256

import numpy as np
from jaxtyping import Int

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Split
from stages.tasks.examples import Prompts
from stages.tasks.templates import STANDARD, context_pattern
from stages.tasks.vocabulary import BOS, LARGEST_NUMBER, Vocabulary, WordVocabulary

NUMBERS = 5  # that are added
LARGEST = LARGEST_NUMBER // NUMBERS  # of them; the smallest is 1, so that no number of a question is its answer
RESULTS = np.arange(NUMBERS, LARGEST_NUMBER + 1)
QUESTION = 2 * NUMBERS  # tokens up to and with `=`
SOLVED = QUESTION + 2  # the result and a comma on top
# Of 16 hash values, the first ten are the train split, and both others have three.
_SPLITS = (Split.TRAIN,) * 10 + (Split.SELECTION,) * 3 + (Split.EVALUATION,) * 3


@cache
def questions(split: Split) -> Int[np.ndarray, "questions numbers"]:
    """All questions of a split.

    Raises:
        ValueError: the split has none.
    """
    if split not in _SPLITS:
        raise ValueError(
            f"arithmetic has no questions in split '{split}': must be one of {', '.join(dict.fromkeys(_SPLITS))}"
        )
    every = np.stack(np.meshgrid(*[np.arange(1, LARGEST + 1)] * NUMBERS, indexing="ij"), axis=-1).reshape(-1, NUMBERS)
    values = [sha256(bytes(question)).digest()[0] for question in every.astype(np.uint8)]
    return every[np.array([_SPLITS[value % len(_SPLITS)] == split for value in values])]


def draw_sums(rng: np.random.Generator, split: Split, n: int, tokens: int) -> Int[np.ndarray, "n sums numbers"]:
    """The numbers of the sums of n prompts: the last is asked for and of the split, the solved ones are of the
    train split.

    Args:
        rng: source of randomness.
        split: TRAIN, SELECTION or EVALUATION.
        n: number of prompts; each question of the split is asked equally often (up to one).
        tokens: length of a prompt.
    """
    asked, known = questions(split), questions(Split.TRAIN)
    solved = -(-(tokens - 1 - QUESTION) // SOLVED)
    sums = known[rng.integers(len(known), size=(n, solved + 1))]
    sums[:, -1] = asked[rng.permutation(np.arange(n) % len(asked))]
    return sums


def render_sums(
    vocabulary: WordVocabulary, sums: Int[np.ndarray, "n sums numbers"], tokens: int
) -> Int[np.ndarray, "n tokens"]:
    """Token ids of `<bos>` and the last tokens of the text, up to the `=` of the last sum."""
    n, count, _ = sums.shape
    text = np.full((n, count, SOLVED), vocabulary.ids["+"])
    text[:, :, 0:QUESTION:2] = vocabulary.numbers[sums - 1]
    text[:, :, QUESTION - 1] = vocabulary.ids["="]
    text[:, :, QUESTION] = vocabulary.numbers[sums.sum(axis=2) - 1]
    text[:, :, QUESTION + 1] = vocabulary.ids[","]
    cut = text.reshape(n, -1)[:, : QUESTION - SOLVED][:, -(tokens - 1) :]
    return np.concatenate([np.full((n, 1), vocabulary.ids[BOS]), cut], axis=1)


def prompt_tokens(boxes: int) -> int:
    """Tokens of a prompt of entity tracking in the standard template, with `<bos>`."""
    return len(context_pattern(STANDARD, boxes, 0)) + 4


def draw_prompts(rng: np.random.Generator, vocabulary: Vocabulary, split: Split, n: int, boxes: int) -> Prompts:
    """Draw prompts as long as those of entity tracking with so many boxes; `objects` are all possible results.

    Raises:
        Invalid: numbers are not one token each.
    """
    if not isinstance(vocabulary, WordVocabulary):
        raise Invalid("new task 'arithmetic': its numbers must be one token each, as with the word-level tokenizer")
    tokens = prompt_tokens(boxes)
    sums = draw_sums(rng, split, n, tokens)
    answer = vocabulary.numbers[sums[:, -1].sum(axis=1) - 1]
    results = np.tile(vocabulary.numbers[RESULTS - 1], (n, 1))
    return Prompts.from_numpy(render_sums(vocabulary, sums, tokens), answer[:, None], answer, results)


def shortcut_scores(prompts: Prompts, vocabulary: Vocabulary) -> dict[str, float]:
    """Mean probability of a right answer under rules that do not add, read from the prompts.

    Returns:
        `random_result`: any possible result;
        `most_frequent_answer`: always the same result, the best one;
        `last_result`: the result of the solved sum before;
        `result_of_most_alike`: the result of the solved sum that shares most numbers with the question, in any
            order, the latest of them;
        `best_by_first_number`, `best_without_last_number`: a result chosen by the first number, or by all but the
            last, the best one for each on one half of the prompts, scored on the other.
    """
    ids, answer = prompts.input_ids.numpy(), prompts.canonical.numpy()
    numbers = ids[:, -QUESTION::2]
    whole = (ids.shape[1] - 1 - QUESTION) // SOLVED
    ends = ids.shape[1] - QUESTION - SOLVED * np.arange(1, whole + 1)  # where each whole solved sum starts, last first
    results = ids[:, ends + QUESTION]
    terms = ids[:, ends[:, None] + 2 * np.arange(NUMBERS)]  # [n, sums, numbers]
    values = np.unique(numbers)
    count = (numbers[:, None, :, None] == values).sum(axis=2)  # [n, 1, values]
    shared = np.minimum((terms[..., None] == values).sum(axis=2), count).sum(axis=2)
    rows = np.arange(len(ids))
    return {
        "random_result": float((prompts.objects == prompts.canonical[:, None]).double().mean()),
        "most_frequent_answer": float(np.unique(answer, return_counts=True)[1].max() / len(answer)),
        "last_result": float((results[:, 0] == answer).mean()),
        "result_of_most_alike": float((results[rows, shared.argmax(axis=1)] == answer).mean()),
        "best_by_first_number": _fitted(numbers[:, :1], answer),
        "best_without_last_number": _fitted(numbers[:, :-1], answer),
    }


def _fitted(known: Int[np.ndarray, "n k"], answer: Int[np.ndarray, "n"]) -> float:
    half = len(answer) // 2
    keys = [tuple(row) for row in known]
    best = {}
    for key in set(keys[:half]):
        here = [i for i in range(half) if keys[i] == key]
        words, counts = np.unique(answer[here], return_counts=True)
        best[key] = words[counts.argmax()]
    return float(np.mean([best.get(key) == right for key, right in zip(keys[half:], answer[half:], strict=True)]))
