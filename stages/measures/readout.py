"""What is read from the logits of patched runs: accuracies, the logit difference and the probability of the answer.

What they are good for, and the names of their means, is in `scores`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.exchange import Reduce

# Logits that are held in float64 at once: few enough for the cache, and for any limit on memory.
EXACT = 2**17


@dataclass(frozen=True)
class Readout:
    """What is read from the logits of n examples in e variants.

    Attributes:
        correct: whether the most likely token of the whole vocabulary is the answer.
        logit_difference: logit of the answer minus the mean logit of the other candidates.
        p_correct: probability of the answer.
        best_candidate: whether the answer is more likely than every other candidate.
    """

    correct: Bool[Tensor, "n e"]
    logit_difference: Float[Tensor, "n e"]
    p_correct: Float[Tensor, "n e"]
    best_candidate: Bool[Tensor, "n e"]

    @staticmethod
    def of(logits: Float[Tensor, "n e vocab"], answer: Int[Tensor, " n"], others: Int[Tensor, "n k"]) -> "Readout":
        """Read the logits out, in float64; others are -1 where there is none."""
        return Readout.join([reading(answer, others)(logits, slice(0, len(logits)))])

    @staticmethod
    def join(parts: Sequence[Float[Tensor, "_ e 4"]]) -> "Readout":
        """One readout of what `reading` gave for some examples after the other."""
        # contiguous, as means of strided numbers add up in another order
        correct, difference, p, best = (column.contiguous() for column in torch.cat(list(parts)).unbind(-1))
        return Readout(correct == 1, difference, p, best == 1)

    def means(self) -> list[dict[str, float]]:
        """The four scores of each variant, see `scores`."""
        columns = {
            "accuracy": self.correct.double(),
            "candidate_accuracy": self.best_candidate.double(),
            "logit_difference": self.logit_difference,
            "p_correct": self.p_correct,
        }
        means = zip(*(column.mean(0).tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in means]


def reading(answer: Int[Tensor, " n"], others: Int[Tensor, "n k"]) -> Reduce:
    """A `Reduce` whose numbers `Readout.join` takes: [n e 4] in float64 on the CPU.

    Logits are read as they come, and only few of them are in float64 at a time.
    """

    def read(logits: Float[Tensor, "n e vocab"], rows: slice) -> Float[Tensor, "n e 4"]:
        n, e, vocab = logits.shape
        right, rest = answer[rows].to(logits.device), others[rows].to(logits.device)
        real = (rest >= 0)[:, None]
        of_answer = logits.gather(-1, right[:, None, None].expand(-1, e, 1))[..., 0].double()
        of_others = logits.gather(-1, rest.clamp(min=0)[:, None].expand(-1, e, -1)).double()
        if bool(real.all()):
            mean = of_others.mean(-1)
        else:
            mean = of_others.masked_fill(~real, 0).sum(-1) / real.sum(-1)
        best = of_answer > of_others.masked_fill(~real, float("-inf")).amax(-1)
        parts = logits.reshape(-1, vocab).split(max(1, EXACT // vocab))
        total = torch.cat([part.double().logsumexp(-1) for part in parts]).view(n, e)
        correct = logits.argmax(-1) == right[:, None]
        columns = [correct.double(), of_answer - mean, (of_answer - total).exp(), best.double()]
        return torch.stack(columns, -1).cpu()

    return read
