"""Mean ablation: what a model still does with only a circuit, or without some of its heads.

The mean of a head is its output z averaged over prompts, for each layer and absolute position (Prakash et
al., ICLR 2024, appendix on circuit evaluation). Two settings:

*Circuit in place.* At the circuit's positions every head outside the circuit gives its mean, and at all other
positions every head does. MLPs, embeddings and norms stay. This is exact at a small cost:

1. One run with every head ablated everywhere is the background. A position where all heads are ablated sees
   only its own token and the means, so its residual stream is the background's for every circuit.
2. A circuit then needs its own positions and the last one only, read against the background's keys and values.
3. Many circuits go through as variants of one pass.

*Heads removed.* Only the given nodes are ablated and everything else is live, so everything from the earliest
of them on is computed again, on top of a clean run.

A node at a position of several tokens is kept, or removed, at all of them. Prompts have equal length: means are by
absolute position, so prompts of other lengths have other means (see `measures.faithfulness` for groups of them).
"""

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.budget import MIB, pass_bytes, rows_that_fit
from stages.circuits.circuit import Node
from stages.circuits.exchange import (
    Given,
    Positions,
    Reduce,
    at_positions,
    keep_in_parts,
    node_weights,
    slices,
    stack_positions,
    swap_in_parts,
    whole_logits,
)
from stages.circuits.walker import Run, Walker
from stages.pipeline.processes import in_processes


def mean_outputs(
    walker: Walker, input_ids: Int[Tensor, "n t"], memory_mib: float, processes: int = 1
) -> Float[Tensor, "layers t h a"]:
    """Mean head outputs z over prompts, accumulated in float64; the prompts are spread over the processes."""
    n, length = input_ids.shape

    def sum_of(part: slice) -> Float[Tensor, "layers t h a"]:
        sums: list[Tensor] = []  # layer by layer, so that no run has to be kept

        def add(layer: int, site: str, x: Tensor, first: int) -> Tensor:
            if site == "z":
                sums.append(x[:, 0].sum(0, dtype=torch.float64).cpu())
            return x

        walker.run(input_ids[part].to(walker.device), add, keep=())
        return torch.stack(sums)

    # beside a pass: the sums of some prompts, layer by layer and together, the sum so far, and the new one
    sums = 4 * walker.n_layers * length * walker.n_heads * walker.head_dim * torch.float64.itemsize
    each = pass_bytes(walker, length, length)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for summed in in_processes(sum_of, slices(n, rows_that_fit(walker, each, memory_mib * MIB - sums)), processes):
        total = total + summed
    return (total / n).to(walker.dtype)


BACKGROUND = ("residual", "keys", "values")  # what of an ablated run circuits need
# what ablated heads give: means, which all prompts share, or outputs of each prompt's own
Outputs = Float[Tensor, "layers t h a"] | Float[Tensor, "layers n t h a"]


@torch.no_grad()
def ablated_run(walker: Walker, input_ids: Int[Tensor, "n t"], means: Outputs) -> Run:
    """The run in which every head gives its mean at every position: the background of all circuits."""
    outputs = means.to(walker.device)
    return walker.run(
        input_ids.to(walker.device), outputs=outputs[:, None] if outputs.ndim == 4 else outputs, keep=BACKGROUND
    )


@torch.no_grad()
def circuits_in_place(
    walker: Walker,
    background: Run,
    means: Outputs,
    positions: Positions,
    circuits: Sequence[Collection[Node]],
    memory_mib: float,
    reduce: Reduce = whole_logits,
) -> Tensor:
    """What is read out at the last position with one circuit each in place and everything else mean-ablated.

    Args:
        walker: the model.
        background: its `ablated_run` on the prompts.
        means: its `mean_outputs`, or what else heads outside a circuit give.
        positions: semantic positions of each prompt. They may coincide: a head is then kept if the circuit has it at
            any of them.
        circuits: the nodes of each circuit; an empty one gives the background.
        memory_mib: how much memory passes may take, beside the background and what is read out.
        reduce: what is read out of the logits, see `exchange.Reduce`; by default all of them.

    Returns:
        [n e ...] on the CPU.
    """
    n, length = background.residual.shape[1:3]
    ends = [name for name in sorted(positions) if bool((positions[name] == length - 1).all())]
    having: dict[frozenset[str], list[int]] = {}  # circuits that need the same positions share their passes
    for number, circuit in enumerate(circuits):
        needed = {node.position for node in circuit}
        having.setdefault(frozenset(needed if needed & set(ends) else {*needed, *ends[:1]}), []).append(number)
    found: dict[int, Tensor] = {}
    for needed, numbers in having.items():
        names = sorted(needed)
        some = [circuits[number] for number in numbers]
        weights = node_weights(some, positions, names, walker.n_layers, walker.n_heads)
        at = stack_positions(positions, names) if names else torch.empty(n, 0, dtype=torch.long, device="cpu")
        if not ends:  # the last position is read out, so it is computed, with its heads ablated
            at = torch.nn.functional.pad(at, (0, 1), value=length - 1)
            weights = torch.nn.functional.pad(weights, (0, 0, 0, 1))
        read = keep_in_parts(walker, background, at, means_at(walker, means, at), weights, memory_mib * MIB, reduce)
        found |= dict(zip(numbers, read.unbind(1), strict=True))
    if not circuits:
        return reduce(background.logits[:, None][:, :0], slice(0, n)).cpu()
    return torch.stack([found[number] for number in range(len(circuits))], dim=1)


@torch.no_grad()
def nodes_removed(
    walker: Walker,
    clean: Run,
    means: Float[Tensor, "layers t h a"],
    positions: Positions,
    nodes: Collection[Node],
    memory_mib: float,
    reduce: Reduce = whole_logits,
) -> Tensor:
    """What is read out at the last position of the whole model with only these nodes mean-ablated.

    Examples that stand in the order of their earliest removed position (`exchange.by_earliest`) take the least time.
    Arguments as of `circuits_in_place`, with a clean run instead of the background.

    Returns:
        [n ...] on the CPU.
    """
    if not nodes:
        return reduce(clean.logits[:, None], slice(0, len(clean.logits))).cpu()[:, 0]
    names = sorted({node.position for node in nodes})
    at = stack_positions(positions, names)
    weights = node_weights([nodes], positions, names, walker.n_layers, walker.n_heads)
    return swap_in_parts(walker, clean, at, means_at(walker, means, at), weights, memory_mib * MIB, reduce)[:, 0]


def means_at(walker: Walker, means: Outputs, at: Int[Tensor, "n p"]) -> Callable[[slice], Given]:
    """Means, or other outputs, at the absolute positions of sites, for an exchange, layer by layer."""
    means, at = means.to(walker.device), at.to(walker.device)

    def given(rows: slice) -> Given:
        if means.ndim == 5:
            return lambda layer: at_positions(means[layer][rows], at[rows])
        return lambda layer: means[layer][at[rows]]

    return given
