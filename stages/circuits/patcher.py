"""What every path patcher answers: over prompts of one length, of many lengths, or in several processes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.checks import check_heads, check_name
from stages.circuits.scores import Metric, Scores, score
from stages.circuits.sweep import Receivers
from stages.circuits.walker import Walker
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class Progress:
    """How far one question about many sets of senders is.

    Attributes:
        done: sets of senders; one that is done for a part of the examples and receivers counts by that part.
        total: sets of senders that are run; those that can have no effect often are not.
        strongest: heads of the set with the largest mean effect so far, as "layer.head, ...".
        effect: that mean effect, in the unit of the measure.
    """

    done: float
    total: int
    strongest: str
    effect: float


class Patcher(ABC):
    """Path-patching effects of any senders on any receivers over some examples.

    Attributes:
        walker: the model.
        positions: semantic positions -> where they are in the clean prompts, [n] or [n k].
        clean: the measure on the clean runs, [n].
        corrupt: the measure on the corrupt runs, [n].
        correct: whether the most probable continuation of the clean prompts is the right one, [n].
        watch: called now and then with the progress of a call of `effects`, and at its end; None by default.

    Results are on the CPU, wherever the model is.
    """

    walker: Walker
    clean: Float[Tensor, "n"]
    corrupt: Float[Tensor, "n"]
    watch: Callable[[Progress], None] | None

    @property
    @abstractmethod
    def correct(self) -> Bool[Tensor, "n"]: ...

    @property
    @abstractmethod
    def positions(self) -> Mapping[str, Int[Tensor, "n ..."]]: ...

    @abstractmethod
    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        """Effect of each of e sets of senders at `position` on each of the receivers, per example:
        measure(patched) - measure(clean).

        Raises:
            Invalid: the examples have no such position, senders or receivers are outside the model, or an effect is
                not a finite number.
        """

    @abstractmethod
    def estimates(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "layers h n"]]:
        """What `head_effects` gives, estimated at the cost of a few patches: what a head changes in the input of the
        receivers and what their attention then puts out are exact, and only what is behind these outputs is a slope,
        that of the clean run (`circuits.estimates`). On the logits the estimates are the effects.

        Raises:
            Invalid: as `effects`.
        """

    def head_effects(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "layers h n"]]:
        """Effect of every single head at `position` on each of the receivers, per example."""
        shape = (self.walker.n_layers, self.walker.n_heads)
        alone = self.effects(position, every_head(*shape), receivers)
        return [effect.view(*shape, -1) for effect in alone]

    def joint_effects(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "n"]]:
        """Effect of all heads at `position` together: does anything there feed these receivers at all?"""
        everything = torch.ones(1, self.walker.n_layers, self.walker.n_heads, dtype=torch.bool, device="cpu")
        return [effect[0] for effect in self.effects(position, everything, receivers)]

    def scores(
        self,
        position: str,
        to: Literal["logits"] | Receivers = "logits",
        metric: Metric = Metric.LOGIT_DIFFERENCE,
    ) -> Scores:
        """Scores of every single head at `position`, [layers h].

        Args:
            to: what the heads send to.
            metric: how effects become scores; the measure must be that of the metric.

        Raises:
            Invalid: as `effects` and `scores.score`.
        """
        return self.scored(metric, self.head_effects(position, [Receivers() if to == "logits" else to])[0])

    def scored(self, metric: Metric, effects: Float[Tensor, "*senders n"]) -> Scores:
        """Scores of effects on these examples.

        Raises:
            Invalid: as `scores.score`.
        """
        return score(metric, effects, self.clean, self.corrupt)


def every_head(layers: int, heads: int) -> Bool[Tensor, "e layers h"]:
    """Every head as a set of its own."""
    return torch.eye(layers * heads, dtype=torch.bool, device="cpu").view(-1, layers, heads)


def head_sets(sets: Sequence[Iterable[tuple[int, int]]], layers: int, heads: int) -> Bool[Tensor, "e layers h"]:
    """Sets of (layer, head) pairs."""
    masks = torch.zeros(len(sets), layers, heads, dtype=torch.bool, device="cpu")
    for mask, chosen in zip(masks, sets, strict=True):
        for head in chosen:
            mask[head] = True
    return masks


def check_paths(
    patcher: Patcher, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
) -> None:
    """Refuses a position that the examples do not have, and senders or receivers outside the model.

    Raises:
        Invalid: as said.
    """
    check_name(position, patcher.positions)
    shape = (patcher.walker.n_layers, patcher.walker.n_heads)
    if senders.shape[1:] != shape:
        raise Invalid(
            f"senders have shape {list(senders.shape)}: must be sets by {shape[0]} layers by {shape[1]} heads"
        )
    for receiver in receivers:
        check_heads(receiver.heads, *shape, f"receiver of {receiver.component}")


def names(senders: Bool[Tensor, "layers h"]) -> str:
    """E.g. "3.0, 4.7"."""
    return ", ".join(f"{layer}.{head}" for layer, head in senders.nonzero().tolist())
