"""Clean prompts with a corrupt partner each, and the positions in them that have names."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class AlignedPairs:
    """Clean prompts of one length, with corrupt ones of one length, be it another. What a measure reads are the logits
    at the last token of each.

    Attributes:
        positions: semantic position -> the token, or the k tokens, where it is in each clean prompt; a span of fewer
            tokens repeats one of them.
        corrupt_positions: the same in the corrupt prompt, where a sender's corrupt output is taken from.

    Raises:
        Invalid: shapes do not fit each other, or a position lies outside its prompt.
    """

    clean_ids: Int[Tensor, "n t"]
    corrupt_ids: Int[Tensor, "n u"]
    positions: Mapping[str, Int[Tensor, "n ..."]]
    corrupt_positions: Mapping[str, Int[Tensor, "n ..."]]

    def __post_init__(self) -> None:
        shape, corrupt = list(self.clean_ids.shape), list(self.corrupt_ids.shape)
        if len(shape) != 2 or len(corrupt) != 2 or shape[0] != corrupt[0]:
            raise Invalid(
                f"clean_ids has shape {shape}, corrupt_ids {corrupt}: must be prompts by tokens, equally many"
            )
        _check_spans(self.positions, shape[0], shape[1], "positions")
        _check_spans(self.corrupt_positions, shape[0], corrupt[1], "corrupt_positions")
        if set(self.positions) - set(self.corrupt_positions):
            missing = ", ".join(sorted(set(self.positions) - set(self.corrupt_positions)))
            raise Invalid(f"corrupt_positions lacks {missing}: must name every position that positions names")
        for name, at in self.spans.items():
            if at.shape != self.corrupt_spans[name].shape:
                raise Invalid(
                    f"positions['{name}'] has {at.shape[1]} tokens, corrupt_positions['{name}'] "
                    f"{self.corrupt_spans[name].shape[1]}: must be equally many, each the partner of one"
                )

    def __len__(self) -> int:
        return len(self.clean_ids)

    @property
    def spans(self) -> dict[str, Int[Tensor, "n k"]]:
        """The positions as spans, those of one token too."""
        return {name: at.view(len(at), -1) for name, at in self.positions.items()}

    @property
    def corrupt_spans(self) -> dict[str, Int[Tensor, "n k"]]:
        return {name: self.corrupt_positions[name].view(len(at), -1) for name, at in self.positions.items()}

    def select(self, index: Tensor | slice) -> "AlignedPairs":
        """Some of the pairs."""
        return AlignedPairs(
            self.clean_ids[index],
            self.corrupt_ids[index],
            {name: at[index] for name, at in self.positions.items()},
            {name: at[index] for name, at in self.corrupt_positions.items()},
        )


def _check_spans(positions: Mapping[str, Tensor], n: int, length: int, what: str) -> None:
    if not positions:
        raise Invalid(f"{what} is empty: must name at least one semantic position")
    for name, at in positions.items():
        shaped = at.ndim in (1, 2) and at.shape[0] == n and 0 not in at.shape[1:]
        if not shaped or at.dtype.is_floating_point or at.dtype.is_complex or at.dtype == torch.bool:
            raise Invalid(
                f"{what}['{name}'] has shape {list(at.shape)} and type {at.dtype}: must be {n} integers, one a prompt, "
                f"or {n} by k for spans of k tokens"
            )
        outside = ((at < 0) | (at >= length)).view(n, -1)
        if bool(outside.any()):
            row = int(outside.any(1).int().argmax())
            wrong = int(at.view(n, -1)[row][outside[row]][0])
            raise Invalid(f"{what}['{name}'] of example {row} = {wrong}: must be from 0 to {length - 1}")
