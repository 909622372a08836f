"""What a new task yields to a model that ignores the binding of objects to boxes.

A level of accuracy certifies that a task was learned only above the best of these scores. They are computed
from the prompts, not from the task's definition: the last label of a prompt is the one that is asked for, and the
object in its box is the last one before that label's first place.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.tasks.examples import Prompts
from stages.tasks.vocabulary import Vocabulary


def shortcut_scores(prompts: Prompts, vocabulary: Vocabulary) -> dict[str, float]:
    """Mean probability of a right answer under rules that need no binding, or only that of the old task.

    Args:
        prompts: of a relation, standard wording.
        vocabulary: what they are said in.

    Returns:
        `random_context_object`: a random object of the context;
        `own_object`: the object in the queried box, the old task's answer; not given for the old task itself;
        `first_object`, `last_object`: that clause's;
        `best_fixed_clause`: always the same clause, the best one of all;
        `most_frequent_canonical_clause`: the clause that holds the canonical answer most often;
        `best_clause_after_label`: a clause chosen by which letter is asked for, the best one for every
        letter;
        `most_frequent_answer`: always the same word, the best one.
    """
    right = _is_right(prompts)
    labels, own = _asked_for(prompts, vocabulary)
    own_is_asked_for = (prompts.valid == prompts.objects.gather(1, own[:, None])).all()
    canonical = (prompts.objects == prompts.canonical[:, None]).double().mean(dim=0).argmax()
    half = torch.arange(len(prompts)) % 2 == 0  # the rule is fitted on one half and scored on the other
    by_label = _fit_by_label(right[half], labels[half])
    chosen = torch.tensor([by_label.get(int(label), 0) for label in labels[~half]])
    words, counts = np.unique(prompts.valid[prompts.valid >= 0].numpy(), return_counts=True)
    frequent = int(words[counts.argmax()])
    own_object = {} if bool(own_is_asked_for) else {"own_object": float(right.gather(1, own[:, None]).mean())}
    return {
        "random_context_object": float(right.mean()),
        **own_object,
        "first_object": float(right[:, 0].mean()),
        "last_object": float(right[:, -1].mean()),
        "best_fixed_clause": float(right.mean(dim=0).max()),
        "most_frequent_canonical_clause": float(right[:, canonical].mean()),
        "best_clause_after_label": float(right[~half].gather(1, chosen[:, None]).mean()),
        "most_frequent_answer": float((prompts.valid == frequent).any(dim=1).double().mean()),
    }


def _is_right(prompts: Prompts) -> Float[Tensor, "n k"]:
    """Whether each object of the context is a right answer."""
    return (prompts.objects[:, :, None] == prompts.valid[:, None, :]).any(dim=2).double()


def _asked_for(prompts: Prompts, vocabulary: Vocabulary) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """The queried label, and its clause, read from the prompts."""
    ids = prompts.input_ids
    place = torch.arange(ids.shape[1])
    known = torch.from_numpy(vocabulary.labels[vocabulary.pool.labels])
    label = ids.gather(1, (torch.isin(ids, known) * place).argmax(dim=1, keepdim=True))
    said = (ids == label).double().argmax(dim=1, keepdim=True)
    is_object = (ids[:, :, None] == prompts.objects[:, None, :]).any(dim=2) & (place < said)
    own = ids.gather(1, (is_object * place).argmax(dim=1, keepdim=True))
    return label[:, 0], (prompts.objects == own).double().argmax(dim=1)


def _fit_by_label(right: Tensor, labels: Tensor) -> dict[int, int]:
    return {int(label): int(right[labels == label].sum(dim=0).argmax()) for label in labels.unique()}
