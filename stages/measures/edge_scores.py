"""Path-patching effects of one model on two halves of the examples: what similarity and overlap compare.

An entry is an edge: a sending head, and the receivers of a hop. Two models that are measured on the same examples share
those examples' noise, so a comparison of them would look better than two halves of one model do. Therefore everything
is compared across halves: one model's even examples with the other's odd ones and the other way round (`crossed`),
against the two halves of one model (`within`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Vector = Float[np.ndarray, " m"]
Both = Float[np.ndarray, "2 m"]  # the same edges on the two halves


@dataclass(frozen=True)
class EdgeScores:
    """Scores of every head as a sender of every hop.

    Attributes:
        hops: their names.
        positions: of the senders of each hop.
        halves: scores on the even and on the odd examples, in the unit of the metric.
        live: whether the sender is below the highest receiver; what is not has no effect in any model.
    """

    hops: tuple[str, ...]
    positions: tuple[str, ...]
    halves: Float[np.ndarray, "2 hops layers h"]
    live: Bool[np.ndarray, "hops layers h"]

    @staticmethod
    def of(hops: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> "EdgeScores | None":
        """The scored hops of a record of stage `discover`; None where there is none.

        Args:
            hops: entries with name, position and feeds (the receiving heads, none for the logits).
            arrays: "<hop>.half0" and "<hop>.half1".
        """
        scored = [hop for hop in hops if f"{hop['name']}.half0" in arrays]
        if not scored:
            return None
        halves = np.stack([[arrays[f"{hop['name']}.half{half}"] for hop in scored] for half in (0, 1)])
        live = np.zeros(halves.shape[1:], dtype=bool)
        for below, hop in zip(live, scored, strict=True):
            below[: max((layer for layer, _ in hop["feeds"]), default=len(below))] = True
        names, positions = (tuple(hop[key] for hop in scored) for key in ("name", "position"))
        return EdgeScores(names, positions, halves.astype(np.float64), live)

    def edges(self, hop: str | None = None) -> Both:
        """Scores of all live edges, or of one hop's."""
        chosen = self.live if hop is None else self.live & (np.array(self.hops) == hop)[:, None, None]
        return self.halves[:, chosen]

    def matched(self, other: "EdgeScores") -> "tuple[EdgeScores, EdgeScores] | None":
        """Both with the hops alone that they share by name, and the edges that are live in both; None without any.

        A hop's name says position and component of every step from its senders to the logits.
        """
        names = [name for name in self.hops if name in other.hops]
        if not names or self.live.shape[1:] != other.live.shape[1:]:
            return None
        first, second = ([scores.hops.index(name) for name in names] for scores in (self, other))
        live = self.live[first] & other.live[second]
        positions = tuple(self.positions[index] for index in first)
        return (
            EdgeScores(tuple(names), positions, self.halves[:, first], live),
            EdgeScores(tuple(names), positions, other.halves[:, second], live),
        )


Compare = Callable[[Vector, Vector], float | None]


def crossed(compare: Compare, one: Both, other: Both) -> float | None:
    """Mean of two comparisons, each of one model on a half with the other model on the other half."""
    return mean([compare(one[0], other[1]), compare(one[1], other[0])])


def within(compare: Compare, one: Both) -> float | None:
    """A model on a half with itself on the other, from both sides."""
    return crossed(compare, one, one)


def mean(values: Sequence[float | None]) -> float | None:
    """Their mean; None where any is undefined."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if values and len(defined) == len(values) else None
