"""Old-task examples made from new-task prompts, for arms that rehearse the old task."""

import torch
from jaxtyping import Int
from torch import Tensor


def as_old_task(
    input_ids: Int[Tensor, "n t"], objects: Int[Tensor, "n k"], relation: int
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n"]]:
    """The old task's question about the same contexts, with its answers.

    A prompt ends in `<label> <relation word> the` and each clause names its object before its label. So the
    question is changed in one token, and the answer is the last object before the label's first mention.

    Args:
        objects: objects of each context, padded with -1.
        relation: token id of the old task's relation word.
    """
    questions = input_ids.clone()
    questions[:, -2] = relation
    place = torch.arange(input_ids.shape[1])
    clause_label = (input_ids[:, :-3] == input_ids[:, -3:-2]).int().argmax(1, keepdim=True)
    is_object = (input_ids[:, :, None] == objects[:, None, :]).any(-1) & (place < clause_label)
    return questions, input_ids.gather(1, (is_object * place).argmax(1, keepdim=True))[:, 0]
