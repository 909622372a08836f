"""The paper's entity-tracking prompts as text, for a real tokenizer: seven boxes, 53 tokens where words are one token.

    The fan is in Box Z, the cross is in Box J, ... . Box Z contains the

The corrupt partner has other objects and labels and asks for a box of neither context (Prakash et al. 2024, section 3).
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from stages.circuits.pairs import AlignedPairs
from stages.tasks.vocabulary import LABELS, OBJECTS

BOXES = 7


def box_prompts(tokenizer: Any, n: int, seed: int = 1) -> tuple[AlignedPairs, Int[Tensor, "n 7"]]:
    """Pairs with the positions of the paper's hops, and the objects of each clean prompt, its answer first.

    The queried clauses are spread evenly.
    """
    objects = [word for word in OBJECTS if len(_ids(tokenizer, f" {word}")) == 1]
    generator = np.random.default_rng(seed)
    clean, corrupt, tokens, at, corrupt_at = [], [], [], [], []
    for number in range(n):
        words, letters = generator.permutation(objects), generator.permutation(LABELS)
        clause = (2 * number + 1) * BOXES // (2 * n)
        other_clause, absent = (clause + 3) % BOXES, letters[2 * BOXES]
        ids, other_ids = (
            _ids(tokenizer, _text(words[part], letters[part], asked))
            for part, asked in ((slice(0, BOXES), letters[clause]), (slice(BOXES, 2 * BOXES), absent))
        )
        assert len(ids) == len(other_ids)
        clean.append(ids)
        corrupt.append(other_ids)
        answer, *others = [words[clause], *np.delete(words[:BOXES], clause)]
        tokens.append([_ids(tokenizer, f" {word}")[0] for word in (answer, *others)])
        at.append(ids.index(_ids(tokenizer, f" {letters[clause]}")[0]))
        corrupt_at.append(other_ids.index(_ids(tokenizer, f" {letters[BOXES + other_clause]}")[0]))
    length = len(clean[0])
    fixed = {"last": torch.full((n,), length - 1), "query_label": torch.full((n,), length - 3)}
    pairs = AlignedPairs(
        torch.tensor(clean),
        torch.tensor(corrupt),
        {**fixed, "earlier_label": torch.tensor(at)},
        {**fixed, "earlier_label": torch.tensor(corrupt_at)},
    )
    return pairs, torch.tensor(tokens)


def _text(objects: Any, labels: Any, asked: str) -> str:
    clauses = ", ".join(f"the {o} is in Box {label}" for o, label in zip(objects, labels, strict=True))
    return f"T{clauses[1:]}. Box {asked} contains the"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
