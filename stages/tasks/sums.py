"""Sums of two numbers for any tokenizer, a new task whose answers may be several tokens (as in the Goat data).

    27 + 15 = 42
    60 + 71 = 131
    12 + 35 =   ->   47

1. A few solved sums come before the question, so that a pretrained model is right now and then (SmolLM2-135M says .1 of
   the answers; written as `12+35=47,` it says .01). They are of the train split, so no prompt gives away a question of
   another one.
2. Ids are what the tokenizer makes of the whole text. Prompts have equal length: of all pairs of numbers, those are
   asked whose question has the commonest number of tokens, and in every prompt equally many solved sums of each of two
   numbers of tokens are shown, in any order. A space before an answer that is a token of its own belongs to the prompt.
3. Where some answer is several tokens, all end with the end of the line; where every one is one token, answers are that
   token alone.
4. Which two numbers are added, in either order, belongs to exactly one split by a hash.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

import numpy as np
from jaxtyping import Int

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import Split
from stages.tasks.examples import Prompts
from stages.tasks.vocabulary import TextVocabulary, Vocabulary

SMALLEST, LARGEST = 10, 99  # of the numbers that are added
SOLVED = 4  # sums before the question
STOP = "\n"
# Of 16 hash values, the first ten are the train split, and both others have three.
_SPLITS = (Split.TRAIN,) * 10 + (Split.SELECTION,) * 3 + (Split.EVALUATION,) * 3
_BEFORE = f"10 + 10 = 20{STOP}"  # what stands before a sum that is cut into tokens
_SUM = re.compile(r"(\d+) \+ (\d+) =(?: (\d+))?")

Pairs = Int[np.ndarray, "_ 2"]


@dataclass(frozen=True, eq=False)
class Said:
    """All sums as a tokenizer says them.

    Attributes:
        asked: split -> the pairs of numbers that are asked.
        shown: number of tokens -> the pairs of the train split whose solved sum has so many; the commonest first, at
            most two.
        answers: (number, number) -> token ids of the answer.
        longest: tokens of the longest answer; 1: every answer is one token, without the comma.
        first: token ids that answers begin with.
        space: what stands between a question's `=` and its answer, in the prompt: a space or nothing.
    """

    asked: dict[Split, Pairs]
    shown: dict[int, Pairs]
    answers: dict[tuple[int, int], tuple[int, ...]]
    longest: int
    first: tuple[int, ...]
    space: str


def split_of(pair: tuple[int, int]) -> Split:
    """The one split that a sum belongs to, in either order of its numbers."""
    return _SPLITS[sha256(bytes(sorted(pair))).digest()[0] % len(_SPLITS)]


@cache
def said(vocabulary: TextVocabulary) -> Said:
    """What a tokenizer makes of all sums.

    Raises:
        Invalid: it joins an answer with the sign before it or the end of the line behind it.
    """
    numbers = range(SMALLEST, LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    before = _encode(vocabulary, [_BEFORE])[0]
    open_sums = _encode(vocabulary, [f"{_BEFORE}{a} + {b} = {a + b}" for a, b in pairs])
    sums = _encode(vocabulary, [f"{_BEFORE}{a} + {b} = {a + b}{STOP}" for a, b in pairs])
    for space in (" ", ""):
        questions = _encode(vocabulary, [f"{_BEFORE}{a} + {b} ={space}" for a, b in pairs])
        if all(whole[: len(question)] == question for question, whole in zip(questions, sums, strict=True)):
            break
    else:
        raise Invalid("new task 'sums': the tokenizer joins '=' with what follows: must be one that cuts text at signs")
    for open_sum, whole in zip(open_sums, sums, strict=True):
        if whole[: len(before)] != before or whole[:-1] != open_sum or len(whole) != len(open_sum) + 1:
            raise Invalid(
                "new task 'sums': the tokenizer has no token for the end of a line, or joins it with its neighbours: "
                "must be one that keeps it apart, as those of GPT-2, Llama or SmolLM2 do"
            )
    asked_tokens = Counter(map(len, questions)).most_common(1)[0][0]
    shown_tokens = [tokens for tokens, _ in Counter(map(len, sums)).most_common(2)]
    rows = list(zip(pairs, questions, open_sums, sums, strict=True))
    several = any(len(open_sum) > len(question) + 1 for _, question, open_sum, _ in rows)
    answers = {pair: (whole if several else open_sum)[len(q) :] for pair, q, open_sum, whole in rows}
    asked = {
        split: np.array([pair for pair, q, _, _ in rows if len(q) == asked_tokens and split_of(pair) == split])
        for split in dict.fromkeys(_SPLITS)
    }
    shown = {
        tokens: np.array([pair for pair, _, _, s in rows if len(s) == tokens and split_of(pair) == Split.TRAIN])
        for tokens in shown_tokens
    }
    shown = {tokens: known for tokens, known in shown.items() if len(known)}
    first = tuple(sorted({answer[0] for answer in answers.values()}))
    return Said(asked, shown, answers, max(map(len, answers.values())), first, space)


def draw_prompts(rng: np.random.Generator, vocabulary: Vocabulary, split: Split, n: int, boxes: int) -> Prompts:
    """Draw prompts; each question of the split is asked equally often (up to one). `objects` are the tokens that
    answers begin with.

    Args:
        boxes: not used; this task has none.

    Raises:
        Invalid: the tokenizer is not one for this task.
    """
    if not isinstance(vocabulary, TextVocabulary):
        raise Invalid(
            "new task 'sums': the word-level tokenizer has too few numbers for it: must be another task, as arithmetic"
        )
    sums = said(vocabulary)
    if split not in sums.asked:
        raise Invalid(f"sums has no questions in split '{split}': must be one of {', '.join(sums.asked)}")
    every = rng.permutation(sums.asked[split])
    asked = every[rng.permutation(np.arange(n) % len(every))]
    order = rng.permuted(np.tile(np.arange(SOLVED) % len(sums.shown), (n, 1)), axis=1)  # which kind stands where
    shown = np.empty((n, SOLVED, 2), np.int64)
    for kind, pairs in enumerate(sums.shown.values()):
        here = order == kind
        shown[here] = pairs[rng.integers(len(pairs), size=int(here.sum()))]
    texts = [
        "".join(f"{a} + {b} = {a + b}{STOP}" for a, b in solved) + f"{question[0]} + {question[1]} ={sums.space}"
        for solved, question in zip(shown.tolist(), asked.tolist(), strict=True)
    ]
    ids = _encode(vocabulary, texts)
    if len(set(map(len, ids))) > 1:
        raise Invalid(
            f"new task 'sums': prompts have {min(map(len, ids))} to {max(map(len, ids))} tokens: must be equally long, "
            "as with a tokenizer that cuts a sum to the same tokens wherever it stands"
        )
    answers = np.full((n, sums.longest), -1)
    for row, (a, b) in enumerate(asked.tolist()):
        answer = sums.answers[a, b]
        answers[row, : len(answer)] = answer
    canonical = answers if sums.longest > 1 else answers[:, 0]
    prompts = np.array([(*vocabulary.bos, *row) for row in ids])
    return Prompts.from_numpy(prompts, canonical[:, None], canonical, np.tile(sums.first, (n, 1)))


def _encode(vocabulary: TextVocabulary, texts: list[str]) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in vocabulary.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def shortcut_scores(prompts: Prompts, vocabulary: Vocabulary) -> dict[str, float]:
    """How often rules are right that do not add, or not wholly, read from the prompts.

    Returns:
        `most_frequent_answer`: always the same result, the best one;
        `shown_result`: the result of one of the solved sums, any of them;
        `last_result`: that of the solved sum before;
        `best_by_first_number`: a result chosen by the first number, the best one for each on one half of the prompts,
            scored on the other;
        `without_carrying`: ones and tens are added as if no sum of ones were ten or more.
    """
    assert isinstance(vocabulary, TextVocabulary)
    texts = [vocabulary.tokenizer.decode(row) for row in prompts.input_ids[:, len(vocabulary.bos) :].tolist()]
    sums = [[(int(a), int(b), c) for a, b, c in _SUM.findall(text)] for text in texts]
    asked = [(row[-1][0], row[-1][1]) for row in sums]
    shown = [[int(c) for _, _, c in row[:-1]] for row in sums]
    right = np.array([a + b for a, b in asked])
    half = len(asked) // 2
    by_first: dict[int, Counter[int]] = {}
    for (a, _), result in zip(asked[:half], right[:half].tolist(), strict=True):
        by_first.setdefault(a, Counter())[result] += 1
    best = [by_first[a].most_common(1)[0][0] if a in by_first else -1 for a, _ in asked[half:]]
    return {
        "most_frequent_answer": Counter(right.tolist()).most_common(1)[0][1] / len(right),
        "shown_result": float(np.mean([results.count(r) / SOLVED for results, r in zip(shown, right, strict=True)])),
        "last_result": float(np.mean([results[-1] == r for results, r in zip(shown, right, strict=True)])),
        "best_by_first_number": float(np.mean(best == right[half:])) if best else 0.0,
        "without_carrying": float(np.mean([a % 10 + b % 10 < 10 for a, b in asked])),
    }
