"""Clean prompts with a corrupt partner each, and the positions in them that have names."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from stages.circuits.checks import check_positions
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class AlignedPairs:
    """Clean prompts with a corrupt partner each; positions may differ from example to example.

    Attributes:
        positions: semantic position -> absolute position in the clean prompt.
        corrupt_positions: the same in the corrupt prompt, where a sender's corrupt output is taken from.
    """

    clean_ids: Int[Tensor, "n t"]
    corrupt_ids: Int[Tensor, "n t"]
    positions: dict[str, Int[Tensor, "n"]]
    corrupt_positions: dict[str, Int[Tensor, "n"]]

    def __post_init__(self) -> None:
        shape, corrupt = list(self.clean_ids.shape), list(self.corrupt_ids.shape)
        if len(shape) != 2 or shape != corrupt:
            raise Invalid(
                f"clean_ids has shape {shape}, corrupt_ids {corrupt}: must be the same two, prompts by tokens"
            )
        check_positions(self.positions, shape[0], shape[1])
        check_positions(self.corrupt_positions, shape[0], shape[1], "corrupt_positions")
        if set(self.positions) - set(self.corrupt_positions):
            missing = ", ".join(sorted(set(self.positions) - set(self.corrupt_positions)))
            raise Invalid(f"corrupt_positions lacks {missing}: must name every position that positions names")
