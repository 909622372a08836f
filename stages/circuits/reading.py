"""What heads read: their attention from and to semantic positions.

Attention weights are read off without a look into the attention itself, so this holds for every model that the walker
runs: in a second pass the values of every layer are replaced by marks, dimension i being 1 at semantic position i and 0
elsewhere. A head's output is then, dimension by dimension, its attention to those positions. It is kept, and the clean
output takes its place, so that every layer reads what it reads in a clean run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.budget import MIB, making_bytes, pass_bytes, rows_that_fit
from stages.circuits.exchange import Positions, slices, stack_positions
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
    positions: Positions,
    memory_mib: float,
    processes: int = 1,
) -> Attention:
    """Attention between semantic positions, a mean over prompts.

    Args:
        walker: the model.
        input_ids: prompts of equal length.
        positions: semantic positions of each prompt; of one with several tokens the attention from them is a mean, and
            the attention to them a sum.
        memory_mib: how much memory each process may take beside the model.
        processes: how many to spread the prompts over; the result does not depend on it.
    """
    names = tuple(sorted(positions))
    at = stack_positions(positions, names).to(walker.device)
    n, length = input_ids.shape

    def summed(part: slice) -> Float[Tensor, "p layers h p"]:
        """Summed over some of the prompts, in float64."""
        ids = input_ids[part].to(walker.device)
        z = walker.run(ids, keep=("z",)).z
        found = [
            _attention(walker, ids, z, at[part], marked).sum(1, dtype=torch.float64)
            for marked in at[part].split(walker.head_dim, 1)
        ]
        return torch.cat(found, -1).transpose(0, 1).cpu()

    of_positions = 4 * walker.n_layers * walker.n_heads * at.shape[1] ** 2 * torch.float64.itemsize
    each = making_bytes(walker, length, ("z",)) + of_positions
    fit = rows_that_fit(walker, each, memory_mib * MIB - of_positions, pass_bytes(walker, length, length))
    shares = torch.zeros((), dtype=torch.float64, device="cpu")
    for some in in_processes(summed, slices(n, min(ROWS_AT_ONCE, fit)), processes):
        shares = shares + some
    sizes = [positions[name][0].numel() for name in names]
    shares = torch.stack([of_readers.mean(0) for of_readers in shares.split(sizes, 0)])
    shares = torch.stack([of_sources.sum(-1) for of_sources in shares.split(sizes, -1)], dim=-1)
    return Attention(names, (shares / n).to(walker.logits_dtype))


def _attention(
    walker: Walker,
    input_ids: Int[Tensor, "n t"],
    z: Float[Tensor, "layers n t h a"],
    readers: Int[Tensor, "n p"],
    marked: Int[Tensor, "n m"],
) -> Float[Tensor, "layers n p h m"]:
    """Attention from some positions to others, given the head outputs of a clean run."""
    rows = torch.arange(len(input_ids), device=walker.device)[:, None]
    dimensions = torch.arange(marked.shape[1], device=walker.device)
    marks = torch.zeros(*input_ids.shape, walker.head_dim, dtype=walker.dtype, device=walker.device)
    marks[rows, marked, dimensions] = 1
    found = []

    def edit(layer: int, site: str, x: Tensor, first: int) -> Tensor:
        if site == "v":
            return marks[:, None, :, None].expand_as(x)
        if site == "z":
            found.append(x[rows, 0, readers, :, : marked.shape[1]])
            return z[layer][:, None]
        return x

    walker.run(input_ids, edit, keep=())
    return torch.stack(found)
