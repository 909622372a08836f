"""What measures of circuits need to know of prompts: ids, answers, and positions with names."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from stages.circuits.exchange import Positions, by_earliest, stack_positions
from stages.pipeline.stage import Invalid

Self = TypeVar("Self", bound="Prompts")


@runtime_checkable
class Prompts(Protocol):
    """Prompts of equal length with answers of one token."""

    @property
    def input_ids(self) -> Int[Tensor, "n t"]:
        """The next token is the answer."""
        ...

    @property
    def answer(self) -> Int[Tensor, " n"]:
        """Token id of the right answer."""
        ...

    @property
    def others(self) -> Int[Tensor, "n k"]:
        """Token ids of the other candidates, at least one a prompt; -1 where a prompt has fewer than another."""
        ...

    @property
    def positions(self) -> Mapping[str, Int[Tensor, "n ..."]]:
        """Semantic position -> its index in each prompt, or its indices: a node there is the head at all of them."""
        ...

    def __len__(self) -> int: ...

    def select(self: Self, index: Any) -> Self:
        """The prompts of an index, slice or mask."""
        ...


@dataclass(frozen=True)
class AnsweredPrompts:
    """The plain form of `Prompts`; see there.

    Raises:
        Invalid: the fields do not hold the same number of prompts, or a prompt has no other candidate.
    """

    input_ids: Int[Tensor, "n t"]
    answer: Int[Tensor, "n"]
    others: Int[Tensor, "n k"]
    positions: Mapping[str, Int[Tensor, "n ..."]]

    def __post_init__(self) -> None:
        n = len(self.input_ids)
        fields = {"answer": self.answer, "others": self.others, **self.positions}
        for name, values in fields.items():
            if len(values) != n:
                raise Invalid(f"{name} has {len(values)} rows: must have one for each of {n} prompts")
        if not bool((self.others >= 0).any(1).all()):
            raise Invalid("others name no candidate in some prompt: must be at least one token id a prompt")

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, index: Any) -> "AnsweredPrompts":
        """The prompts of an index, slice or mask."""
        positions = {name: at[index] for name, at in self.positions.items()}
        return AnsweredPrompts(self.input_ids[index], self.answer[index], self.others[index], positions)


def placed(prompts: Prompts, positions: Positions) -> AnsweredPrompts:
    """The same prompts with other positions."""
    return AnsweredPrompts(prompts.input_ids, prompts.answer, prompts.others, positions)


def tail_order(prompts: Prompts, names: Collection[str]) -> Int[Tensor, " n"]:
    """Indices of the prompts in an order in which passes from the earliest named position on are shortest."""
    if not names:
        return torch.arange(len(prompts), device="cpu")
    return by_earliest(stack_positions(prompts.positions, sorted(names)))


def in_tail_order(prompts: Self, names: Collection[str]) -> Self:
    """The prompts in `tail_order`."""
    return prompts.select(tail_order(prompts, names))


def spread(prompts: Self, n: int) -> Self:
    """At most n of the prompts, evenly spread over their order."""
    last, size = len(prompts) - 1, min(n, len(prompts))
    return prompts.select(torch.linspace(0, last, size, device="cpu").round().long())
