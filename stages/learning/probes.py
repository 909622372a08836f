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


@dataclass(frozen=True)
class Probe:
    """Fixed examples and the base, against which every checkpoint is scored.

    Attributes:
        old: examples of the old task.
        new: prompts of the new task.
        base_log_probs: log-probabilities of the base at the last token of `new`, float64.
        base_weights: copies of the base's parameters by name; of a base with adapters none, since what they add is the
            change.
    """

    old: "Examples"
    new: "Prompts"
    base_log_probs: Float[Tensor, "n vocab"]
    base_weights: dict[str, Tensor]

    @classmethod
    def of(cls, base: "PreTrainedModel", old: "Examples", new: "Prompts") -> "Probe":
        kept = {} if adapter_layers(base) else {name: w.detach().clone() for name, w in base.named_parameters()}
        return cls(old, new, last_log_probs(base, new.input_ids), kept)

    def measure(self, model: "PreTrainedModel") -> dict[str, float]:
        """The measured columns of a training curve.

        Accuracies compare the argmax over the whole vocabulary with the valid answers; `kl_new` is
        KL(base || model) on the new prompts in nats; `weight_norm` is the Euclidean norm of the whole change.
        """
        was_training = model.training
        model.eval()
        old, new = last_log_probs(model, self.old.input_ids), last_log_probs(model, self.new.input_ids)
        model.train(was_training)
        kl = (self.base_log_probs.exp() * (self.base_log_probs - new)).sum(-1)
        return {
            "old_accuracy": (old.argmax(-1) == self.old.answer).double().mean().item(),
            "old_p_correct": old.exp().gather(1, self.old.answer[:, None]).mean().item(),
            "new_accuracy": is_valid(new, self.new.valid).double().mean().item(),
            "new_valid_mass": valid_mass(new, self.new.valid).mean().item(),
            "kl_new": kl.mean().item(),
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


def valid_mass(log_probs: Float[Tensor, "n vocab"], valid: Int[Tensor, "n v"]) -> Float[Tensor, "n"]:
    """Probability of the valid answers, whose padding is -1."""
    return (log_probs.exp().gather(1, valid.clamp(min=0)) * (valid >= 0)).sum(-1)


def is_valid(log_probs: Float[Tensor, "n vocab"], valid: Int[Tensor, "n v"]) -> Bool[Tensor, "n"]:
    """Whether the most likely token of the whole vocabulary is one of the valid answers."""
    return (log_probs.argmax(-1, keepdim=True) == valid).any(-1)
