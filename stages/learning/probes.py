"""Scores of a model while it learns: old task, new task, distance from the base."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.learning.adapters import adapter_layers, squared_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.tasks.examples import Examples, Prompts


@torch.no_grad()
def last_logits(model: "PreTrainedModel", input_ids: Int[Tensor, "n t"], batch: int = 32) -> Float[Tensor, "n vocab"]:
    """Logits at the last position of equal-length prompts, on the CPU; small batches stay in a processor's cache."""
    with torch.inference_mode():
        # no text is continued, so keys and values need not be kept
        parts = [
            model(input_ids=rows.to(model.device), logits_to_keep=1, use_cache=False).logits[:, -1].cpu()
            for rows in input_ids.split(batch)
        ]
    return torch.cat(parts)  # an ordinary tensor, which a later graph may contain


def last_log_probs(model: "PreTrainedModel", input_ids: Int[Tensor, "n t"]) -> Float[Tensor, "n vocab"]:
    """Log-probabilities of the next token, in float64."""
    return last_logits(model, input_ids).double().log_softmax(-1)


@torch.no_grad()
def answer_logits(
    model: "PreTrainedModel", input_ids: Int[Tensor, "n t"], answers: Int[Tensor, "n length"], batch: int = 32
) -> Float[Tensor, "n length vocab"]:
    """Logits at the place of every token of an answer, given the prompt and the answer's tokens before it; on the CPU.

    Args:
        answers: padded with -1 behind their ends; what is said of padded places is meaningless.
    """
    # what stands behind an answer's end is seen by no place of it, so that any token will do
    texts = torch.cat([input_ids, answers[:, :-1].clamp(min=0)], 1)
    keep = answers.shape[1]
    with torch.inference_mode():
        parts = [
            model(input_ids=rows.to(model.device), logits_to_keep=keep, use_cache=False).logits.cpu()
            for rows in texts.split(batch)
        ]
    return torch.cat(parts)


def canonical_logits(model: "PreTrainedModel", prompts: "Prompts") -> Float[Tensor, "places vocab"]:
    """Logits at all places of the canonical answers, prompt by prompt; of one-token answers, at the last token."""
    if not prompts.several_tokens:
        return last_logits(model, prompts.input_ids)
    return answer_logits(model, prompts.input_ids, prompts.canonical)[prompts.canonical >= 0]


@dataclass(frozen=True)
class AnswerScores:
    """What a model says to prompts of a new task, in float64.

    Attributes:
        right: whether the greedy answer is a valid one: the most likely token of the whole vocabulary, again and again
            for an answer of several tokens.
        log_probs: log-probability of every valid answer as a whole; minus infinity where there are fewer than v.
        canonical: log-probabilities of all tokens at the places of the canonical answers (see `canonical_logits`).
    """

    right: Bool[Tensor, "n"]
    log_probs: Float[Tensor, "n v"]
    canonical: Float[Tensor, "places vocab"]

    @property
    def valid_mass(self) -> Float[Tensor, "n"]:
        """Probability of all valid answers together."""
        return self.log_probs.exp().sum(-1)


def score_answers(model: "PreTrainedModel", prompts: "Prompts") -> AnswerScores:
    """Score the valid answers, each given token by token.

    An answer is the greedy one if and only if each of its tokens is the most likely one after those before it, so
    nothing needs to be generated.
    """
    valid = prompts.valid
    if not prompts.several_tokens:
        log_p = last_log_probs(model, prompts.input_ids)
        own = log_p.gather(1, valid.clamp(min=0)).masked_fill(valid < 0, -torch.inf)
        return AnswerScores(is_valid(log_p, valid), own, log_p)
    n, options, length = valid.shape
    right, own = torch.zeros(n, dtype=torch.bool), torch.full((n, options), -torch.inf, dtype=torch.float64)
    canonical = torch.zeros(n, length, model.config.vocab_size, dtype=torch.float64)
    for option, answers in enumerate(valid.unbind(1)):
        said = answers >= 0
        log_p = answer_logits(model, prompts.input_ids, answers).double().log_softmax(-1)
        of_tokens = log_p.gather(2, answers.clamp(min=0)[..., None])[..., 0]
        own[:, option] = (of_tokens * said).sum(1).masked_fill(~said[:, 0], -torch.inf)
        right |= said[:, 0] & ((log_p.argmax(-1) == answers) | ~said).all(1)
        is_canonical = (answers == prompts.canonical).all(1)
        canonical[is_canonical] = log_p[is_canonical]
    return AnswerScores(right, own, canonical[prompts.canonical >= 0])


@dataclass(frozen=True)
class Probe:
    """Fixed examples and the base, against which every checkpoint is scored.

    Attributes:
        old: examples of the old task.
        new: prompts of the new task.
        base_log_probs: log-probabilities of the base at the places of the canonical answers of `new`, float64.
        base_weights: copies of the base's parameters by name; of a base with adapters none, since what they add is the
            change.
    """

    old: "Examples"
    new: "Prompts"
    base_log_probs: Float[Tensor, "places vocab"]
    base_weights: dict[str, Tensor]

    @classmethod
    def of(cls, base: "PreTrainedModel", old: "Examples", new: "Prompts") -> "Probe":
        kept = {} if adapter_layers(base) else {name: w.detach().clone() for name, w in base.named_parameters()}
        return cls(old, new, canonical_logits(base, new).double().log_softmax(-1), kept)

    def measure(self, model: "PreTrainedModel") -> dict[str, float]:
        """The measured columns of a training curve.

        Accuracies compare the argmax over the whole vocabulary with the valid answers; `kl_new` is
        KL(base || model) on the new prompts in nats, summed over the places of the canonical answer; `weight_norm` is
        the Euclidean norm of the whole change.
        """
        was_training = model.training
        model.eval()
        old, new = last_log_probs(model, self.old.input_ids), score_answers(model, self.new)
        model.train(was_training)
        kl = (self.base_log_probs.exp() * (self.base_log_probs - new.canonical)).sum(-1)
        return {
            "old_accuracy": (old.argmax(-1) == self.old.answer).double().mean().item(),
            "old_p_correct": old.exp().gather(1, self.old.answer[:, None]).mean().item(),
            "new_accuracy": new.right.double().mean().item(),
            "new_valid_mass": new.valid_mass.mean().item(),
            "kl_new": kl.mean().item() * (len(kl) / len(self.new)),
            "weight_norm": self._squared_change(model).sqrt().item(),
        }

    @torch.no_grad()
    def _squared_change(self, model: "PreTrainedModel") -> Float[Tensor, ""]:
        """Sum of squares of the change of all weights, in float64; one tensor at a time."""
        if adapter_layers(model):
            return squared_change(model)
        return torch.stack(
            [(w - self.base_weights[n]).double().square_().sum() for n, w in model.named_parameters()]
        ).sum()


def is_valid(log_probs: Float[Tensor, "n vocab"], valid: Int[Tensor, "n v"]) -> Bool[Tensor, "n"]:
    """Whether the most likely token of the whole vocabulary is one of the valid answers."""
    return (log_probs.argmax(-1, keepdim=True) == valid).any(-1)
