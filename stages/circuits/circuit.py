"""Heads, groups and circuits as frozen values."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from stages.pipeline.files import read_json, write_json
from stages.pipeline.stage import Invalid

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
        receiver: name of the group that reads from it, or "logits"; None where unknown.
        component: which input of the receiver it writes to; None for the logits, or where unknown.
        heads: (layer, head) pairs, strongest first.
        scores: path-patching score of each head, same order; empty where unknown.
        sign: +1: its heads raise the measure of the answer, -1: they lower it (negative movers, copy suppression).
    """

    name: str
    position: str
    receiver: str | None
    component: Component | None
    heads: tuple[tuple[int, int], ...]
    scores: tuple[float, ...] = ()
    sign: int = 1

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(layer, head, self.position) for layer, head in self.heads)

    def only(self, nodes: Collection[Node]) -> "Group":
        """The group with those of its heads alone that are among some nodes."""
        places = [place for place, node in enumerate(self.nodes) if node in nodes]
        scores = tuple(self.scores[place] for place in places) if self.scores else ()
        return replace(self, heads=tuple(self.heads[place] for place in places), scores=scores)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "position": self.position,
            "receiver": self.receiver,
            "component": None if self.component is None else str(self.component),
            "sign": self.sign,
            "heads": [list(head) for head in self.heads],
            "scores": list(self.scores),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Group":
        """What `to_json` gave; a group without a sign raises the measure."""
        return Group(
            name=data["name"],
            position=data["position"],
            receiver=data["receiver"],
            component=None if data["component"] is None else Component(data["component"]),
            heads=tuple((layer, head) for layer, head in data["heads"]),
            scores=tuple(data["scores"]),
            sign=data.get("sign", 1),
        )


@dataclass(frozen=True)
class Circuit:
    """A circuit: groups of heads at positions, with the paths between them.

    MLPs, embeddings and norms are always part of it; only (head, position) pairs are chosen.

    Attributes:
        groups: of heads that are part of it.
        n_layers, n_heads: of the model.
        identifiable: whether there could be one.
        idle: of heads that were found and are no part of it, since it does as well without them (`measures.idle`); for
            pictures. A group may have heads here and there.
    """

    groups: tuple[Group, ...]
    n_layers: int
    n_heads: int
    identifiable: bool = True
    idle: tuple[Group, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All distinct nodes, sorted; a head found by two hops counts once."""
        return tuple(sorted({node for group in self.groups for node in group.nodes}))

    def to_json(self) -> dict[str, Any]:
        return {
            "identifiable": self.identifiable,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "groups": [group.to_json() for group in self.groups],
            "idle": [group.to_json() for group in self.idle],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Circuit":
        """What `to_json` gave; one from before heads could be idle has none that are."""
        groups, idle = (tuple(map(Group.from_json, entries)) for entries in (data["groups"], data.get("idle", ())))
        return Circuit(groups, data["n_layers"], data["n_heads"], data["identifiable"], idle)

    def save(self, path: str | Path) -> None:
        """Write the circuit as JSON."""
        write_json(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Circuit":
        """The circuit in a file that `save` wrote.

        Raises:
            Invalid: the file holds no circuit.
        """
        try:
            return Circuit.from_json(read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            wrong = f"{type(error).__name__}: {error}"
            raise Invalid(f"{path} holds no circuit ({wrong}): must be as Circuit.save wrote it") from error

    @staticmethod
    def from_heads(
        classes: Mapping[str, Sequence[tuple[int, int] | str]],
        position: str | Mapping[str, str],
        n_layers: int,
        n_heads: int,
        sign: int | Mapping[str, int] = 1,
        feeds: Mapping[str, tuple[str, str | None]] | None = None,
    ) -> "Circuit":
        """A circuit from a published list of heads.

        Args:
            classes: name of a class -> its heads, each as (layer, head) or as text with the two numbers in this order:
                "10.7", "L10H7", "a10.h7".
            position: of all heads, or of each class.
            n_layers: of the model.
            n_heads: of one of its layers.
            sign: of all classes, or of those that are named; the others raise the measure.
            feeds: class -> (the class that reads from it, or "logits"; its input "q", "k" or "v"). The receiver of a
                class that is not named is unknown.

        Raises:
            Invalid: a head is not in the model or is twice in its class, a class has no position, a sign is not +1
                or -1, or a class that is named by an argument is not there.
        """
        positions = dict.fromkeys(classes, position) if isinstance(position, str) else position
        signs = dict.fromkeys(classes, sign) if isinstance(sign, int) else sign
        for argument, named in (("position", positions), ("sign", signs), ("feeds", feeds or {})):
            if unknown := sorted(set(named) - set(classes)):
                raise Invalid(f"{argument} names the class '{unknown[0]}': must be one of {', '.join(classes)}")
        groups = []
        for name, heads in classes.items():
            if name not in positions:
                raise Invalid(f"class '{name}' has no position: `position` must be one name, or one for every class")
            if signs.get(name, 1) not in (1, -1):
                raise Invalid(f"sign of class '{name}' = {signs[name]}: must be 1 or -1")
            receiver, component = (feeds or {}).get(name, (None, None))
            if receiver is not None and receiver != LOGITS and receiver not in classes:
                raise Invalid(f"class '{name}' feeds '{receiver}': must be '{LOGITS}' or one of {', '.join(classes)}")
            into = None if component is None else Component(component)
            pairs = tuple(_head(head, f"class '{name}'", n_layers, n_heads) for head in heads)
            twice = [head for head, times in Counter(pairs).items() if times > 1]
            if twice:
                raise Invalid(f"class '{name}' has head {twice[0][0]}.{twice[0][1]} twice: must have every head once")
            groups.append(Group(name, positions[name], receiver, into, pairs, (), signs.get(name, 1)))
        return Circuit(tuple(groups), n_layers, n_heads)


def _head(head: tuple[int, int] | str, what: str, n_layers: int, n_heads: int) -> tuple[int, int]:
    """(layer, head) of a head that is written down in one of the usual ways."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", head)) if isinstance(head, str) else tuple(head)
    if len(numbers) != 2:
        raise Invalid(f"{what}: head {head!r} must be a layer and a head, as (10, 7), '10.7', 'L10H7' or 'a10.h7'")
    if not (0 <= numbers[0] < n_layers and 0 <= numbers[1] < n_heads):
        raise Invalid(f"{what}: head {head!r} must be below {n_layers} layers of {n_heads} heads")
    return numbers[0], numbers[1]
