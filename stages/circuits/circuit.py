"""Heads, groups and circuits as frozen values."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

LOGITS = "logits"  # the receiver name of the last step of a circuit: the output logits at the last token
LAST = "last"  # the position that is read out: the last token of every prompt


class Component(StrEnum):
    """Which input of a receiving head a path ends in."""

    Q = "q"  # its query, at the position where the head reads from
    K = "k"  # its key, at the position that the head attends to
    V = "v"  # its value, at the position that the head attends to


@dataclass(frozen=True, order=True)
class Node:
    """One attention head at one semantic position; the unit of a circuit.

    Attributes:
        layer: 0-based layer.
        head: 0-based query head.
        position: semantic position, a key of the examples' `positions` ("last", "query_label", ...).
    """

    layer: int
    head: int
    position: str


@dataclass(frozen=True)
class Group:
    """Heads at one position that were found together as senders to the same receivers.

    Attributes:
        name: unique in its circuit.
        position: semantic position of all its nodes.
        receiver: name of the group that reads from it, or "logits".
        component: which input of the receiver it writes to; None for the logits.
        heads: (layer, head) pairs, strongest first.
        scores: path-patching score of each head, same order; empty where unknown.
    """

    name: str
    position: str
    receiver: str
    component: Component | None
    heads: tuple[tuple[int, int], ...]
    scores: tuple[float, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(layer, head, self.position) for layer, head in self.heads)


@dataclass(frozen=True)
class Circuit:
    """A circuit: groups of heads at positions, with the paths between them.

    MLPs, embeddings and norms are always part of it; only (head, position) pairs are chosen.
    """

    groups: tuple[Group, ...]
    n_layers: int
    n_heads: int
    identifiable: bool = True

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All distinct nodes, sorted; a head found by two hops counts once."""
        return tuple(sorted({node for group in self.groups for node in group.nodes}))

    def to_json(self) -> dict[str, Any]:
        return {
            "identifiable": self.identifiable,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "groups": [
                {
                    "name": group.name,
                    "position": group.position,
                    "receiver": group.receiver,
                    "component": None if group.component is None else str(group.component),
                    "heads": [list(head) for head in group.heads],
                    "scores": list(group.scores),
                }
                for group in self.groups
            ],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Circuit":
        groups = tuple(
            Group(
                name=entry["name"],
                position=entry["position"],
                receiver=entry["receiver"],
                component=None if entry["component"] is None else Component(entry["component"]),
                heads=tuple((layer, head) for layer, head in entry["heads"]),
                scores=tuple(entry["scores"]),
            )
            for entry in data["groups"]
        )
        return Circuit(groups, data["n_layers"], data["n_heads"], data["identifiable"])
