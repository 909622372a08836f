"""Mean ablation: what a model still does with only a circuit, or without some of its heads.

The mean of a head is its output z averaged over prompts, for each layer and absolute position (Prakash et
al., ICLR 2024, appendix on circuit evaluation). Two settings:

*Circuit in place.* At the circuit's positions every head outside the circuit gives its mean, and at all other
positions every head does. MLPs, embeddings and norms stay. This is exact at a small cost:

1. One run with every head ablated everywhere is the background. A position where all heads are ablated sees
   only its own token and the means, so its residual stream is the background's for every circuit.
2. A circuit then needs its own positions only, read against the background's keys and values.
3. Many circuits go through as variants of one pass.

*Heads removed.* Only the given nodes are ablated and everything else is live, so everything from the earliest
of them on is computed again, on top of a clean run.
"""

from collections.abc import Collection, Sequence
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.circuit import LAST, Node
from stages.circuits.exchange import (
    Positions,
    Sites,
    exchange_in_parts,
    node_weights,
    rows_that_fit,
    slices,
    stack_positions,
)
from stages.circuits.walker import Run, Walker
from stages.pipeline.processes import in_processes


def mean_outputs(
    walker: Walker, input_ids: Int[Tensor, "n t"], memory_mib: float, processes: int = 1
) -> Float[Tensor, "layers t h a"]:
    """Mean head outputs z over prompts, accumulated in float64; the prompts are spread over the processes."""
    n, length = input_ids.shape

    @torch.no_grad()
    def sum_of(part: slice) -> Float[Tensor, "layers t h a"]:
        return walker.run(input_ids[part]).z.sum(1, dtype=torch.float64)

    parts = slices(n, rows_that_fit(walker, length, length, memory_mib))
    total = reduce(torch.add, in_processes(sum_of, parts, processes))
    return (total / n).to(walker.dtype)


@torch.no_grad()
def ablated_run(walker: Walker, input_ids: Int[Tensor, "n t"], means: Float[Tensor, "layers t h a"]) -> Run:
    """The run in which every head gives its mean at every position: the background of all circuits."""
    return walker.run(input_ids, outputs=means[:, None])


@torch.no_grad()
def circuits_in_place(
    walker: Walker,
    background: Run,
    means: Float[Tensor, "layers t h a"],
    positions: Positions,
    circuits: Sequence[Collection[Node]],
    memory_mib: float,
) -> Float[Tensor, "n e vocab"]:
    """Logits at the last position with one circuit each in place and everything else mean-ablated.

    Args:
        walker: the model.
        background: its `ablated_run` on the same prompts.
        means: its `mean_outputs`. positions: semantic positions of each prompt, among them "last". They may
            coincide: a head is then kept if the circuit has it at any of them.
        circuits: the nodes of each circuit; an empty one gives the background.
        memory_mib: how much memory a pass may take, roughly.
    """
    having: dict[frozenset[str], list[int]] = {}  # circuits that need the same positions share their passes
    for number, circuit in enumerate(circuits):
        having.setdefault(frozenset({node.position for node in circuit} | {LAST}), []).append(number)
    logits = background.logits[:, None].repeat(1, len(circuits), 1)
    for needed, numbers in having.items():
        names = sorted(needed)
        at = stack_positions(positions, names)
        sites = Sites.alone(at, means.shape[1], walker.dtype)
        some = [circuits[number] for number in numbers]
        weights = node_weights(some, positions, names, walker.n_layers, walker.n_heads)
        kept = exchange_in_parts(walker, background, sites, means[:, at], weights, memory_mib, ablated=True)
        logits[:, numbers] = kept
    return logits


@torch.no_grad()
def nodes_removed(
    walker: Walker,
    clean: Run,
    means: Float[Tensor, "layers t h a"],
    positions: Positions,
    nodes: Collection[Node],
    memory_mib: float,
) -> Float[Tensor, "n vocab"]:
    """Logits at the last position of the whole model with only these nodes mean-ablated.

    Examples that stand in the order of their earliest removed position (`exchange.by_earliest`) take the
    least time.
    """
    if not nodes:
        return clean.logits
    names = sorted({node.position for node in nodes})
    at = stack_positions(positions, names)
    weights = node_weights([nodes], positions, names, walker.n_layers, walker.n_heads)
    length = means.shape[1]
    logits = []
    for part in slices(len(at), rows_that_fit(walker, length, length, memory_mib)):
        sites = Sites.tail(at[part], length, walker.dtype)
        run = clean.select(part)
        logits.append(exchange_in_parts(walker, run, sites, means[:, at[part]], weights, memory_mib)[:, 0])
    return torch.cat(logits)
