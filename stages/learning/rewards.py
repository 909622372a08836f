"""Rewards in the form that TRL calls: one number for each completion."""

from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor

Reward = Callable[..., list[float | None]]  # None = not scored


def validity(valid: Int[Tensor, "n v *length"]) -> Reward:
    """Reward 1 where the completion, cut to the length of the longest answer, is a valid answer, else 0.

    Args:
        valid: valid answers of each training row, padded with -1; a prompt is named by its row number.
    """
    sequences = valid if valid.ndim == 3 else valid[..., None]
    length = sequences.shape[2]
    answers = [{tuple(token for token in answer if token >= 0) for answer in row} - {()} for row in sequences.tolist()]

    # Token ids are compared, never text: decoding drops special tokens, so different answers can look alike.
    def reward(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float | None]:
        pairs = zip(prompts, completion_ids, strict=True)
        return [float(tuple(ids[:length]) in answers[int(prompt)]) for prompt, ids in pairs]

    return reward
