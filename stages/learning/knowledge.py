"""What a base knows of the old task and of the new ones, before any fine-tuning."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from stages.learning.probes import last_log_probs, score_answers
from stages.tasks.contexts import Split
from stages.tasks.examples import Prompts
from stages.tasks.new_tasks import NEW_TASKS, impossible
from stages.tasks.old_task import OldTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def old_task(
    model: "PreTrainedModel", ids: Int[Tensor, "n t"], answer: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """For each prompt, whether the most probable token is the answer (1 or 0), and its probability."""
    log_p = last_log_probs(model, ids)
    return (log_p.argmax(dim=1) == answer).double(), log_p.gather(1, answer[:, None])[:, 0].exp()


def old_scores(model: "PreTrainedModel", ids: Int[Tensor, "n t"], answer: Int[Tensor, "n"]) -> dict[str, float]:
    """`accuracy` and `p_correct`, the means of `old_task`."""
    correct, probability = old_task(model, ids, answer)
    return {"accuracy": float(correct.mean()), "p_correct": float(probability.mean())}


def new_task(model: "PreTrainedModel", prompts: Prompts) -> dict[str, float]:
    """How much of a new task a model knows: greedy accuracy, probability of right answers, and pass@8.

    pass@8 is the mean over prompts of 1 - (1 - m)^8, with m the probability of all right answers together:
    the chance that one of eight samples is right. `context_mass` is the probability of the tokens that an answer can be
    or begin with.
    """
    scores = score_answers(model, prompts)
    mass, log_p = scores.valid_mass, scores.canonical
    if prompts.several_tokens:  # the first place of each prompt
        places = (prompts.canonical >= 0).sum(1)
        log_p = log_p[places.cumsum(0) - places]
    on_objects = log_p.exp().gather(1, prompts.objects).sum(dim=1)
    return {
        "accuracy": float(scores.right.double().mean()),
        "valid_mass": float(mass.mean()),
        "context_mass": float(on_objects.mean()),
        "pass_at_8": float((1 - (1 - mass).clamp(min=0) ** 8).mean()),
    }


def measure_base(model: "PreTrainedModel", old: OldTask, n: int, entropy: Sequence[int]) -> dict[str, Any]:
    """What a model knows of every variant of the old task (kind -> variant -> `old_scores`), and as `tasks` of every
    new task that the tokenizer is made for (selection split).

    Args:
        old: the old task, as the model's tokenizer says it.
        n: prompts of each kind.
        entropy: of the draws; every new task has a stream of its own, so that one more changes no other.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, variant, ids, answer in old.variants(np.random.default_rng(entropy), n):
        found.setdefault(kind, {})[variant] = old_scores(model, ids, answer)
    tasks, cannot = {}, impossible(old.vocabulary, old.boxes)
    for name, task in NEW_TASKS.items():
        if name not in cannot:
            rng = np.random.default_rng([*entropy, crc32(name.encode())])
            tasks[name] = new_task(model, task.draw(rng, old.vocabulary, Split.SELECTION, n, old.boxes))
    return found | {"tasks": tasks}
