"""What heads read: their attention from and to semantic positions.

Attention weights are read off without a look into the attention itself, so this holds for every model that the walker
runs: in a second pass the values of every layer are replaced by marks, dimension i being 1 at semantic position i and 0
elsewhere. A head's output is then, dimension by dimension, its attention to those positions. It is kept, and the clean
output takes its place, so that every layer reads what it reads in a clean run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.exchange import rows_that_fit, slices
from stages.circuits.walker import Walker
from stages.pipeline.processes import in_processes

ROWS_AT_ONCE = 32  # prompts of one pass; more fall out of the processor's cache


@dataclass(frozen=True)
class Attention:
    """Mean attention of every head between semantic positions.

    Attributes:
        names: the semantic positions.
        shares: from the first position to the second; where positions coincide both of them get it.
    """

    names: tuple[str, ...]
    shares: Float[Tensor, "p layers h p"]

    def most_read(self, position: str, heads: Sequence[tuple[int, int]]) -> tuple[str, float]:
        """The semantic position that heads at `position` attend to most, and their mean attention to it."""
        found = torch.stack([self.shares[self.names.index(position), layer, head] for layer, head in heads]).mean(0)
        at = int(found.argmax())
        return self.names[at], float(found[at])


@torch.no_grad()
def mean_attention(
    walker: Walker,
    input_ids: Int[Tensor, "n t"],
    positions: Mapping[str, Int[Tensor, " n"]],
    memory_mib: float,
    processes: int = 1,
) -> Attention:
    """Attention between semantic positions, a mean over prompts.

    Args:
        walker: the model.
        input_ids: prompts of equal length.
        positions: semantic positions of each prompt.
        memory_mib: how much memory a pass may take, roughly.
        processes: how many to spread the prompts over; the result does not depend on it.
    """
    names = tuple(sorted(positions))
    at = torch.stack([positions[name] for name in names], 1)  # n p
    n, length = input_ids.shape

    def summed(part: slice) -> Float[Tensor, "p layers h p"]:
        """Summed over some of the prompts, in float64."""
        found = [
            _attention(walker, input_ids[part], at[part], marked).sum(1, dtype=torch.float64)
            for marked in at[part].split(walker.head_dim, 1)
        ]
        return torch.cat(found, -1).transpose(0, 1)

    parts = slices(n, min(ROWS_AT_ONCE, rows_that_fit(walker, length, length, memory_mib)))
    shares = torch.stack(list(in_processes(summed, parts, processes))).sum(0)
    return Attention(names, (shares / n).to(walker.dtype))


def _attention(
    walker: Walker, input_ids: Int[Tensor, "n t"], readers: Int[Tensor, "n p"], marked: Int[Tensor, "n m"]
) -> Float[Tensor, "layers n p h m"]:
    """Attention from some positions to others."""
    clean = walker.run(input_ids)
    rows = torch.arange(len(input_ids))[:, None]
    marks = torch.zeros(*input_ids.shape, walker.head_dim, dtype=walker.dtype)
    marks[rows, marked, torch.arange(marked.shape[1])] = 1
    found = []

    def edit(layer: int, site: str, x: Tensor, first: int) -> Tensor:
        if site == "v":
            return marks[:, None, :, None].expand_as(x)
        if site == "z":
            found.append(x[rows, 0, readers, :, : marked.shape[1]])
            return clean.z[layer][:, None]
        return x

    walker.run(input_ids, edit)
    return torch.stack(found)
