"""Cross-model activation patching (CMAP): head outputs, or inputs, of one model at work in another.

Source: Prakash et al., ICLR 2024, section 6. Donor and receiver read the same prompts. At the nodes of a
group, or of a whole circuit, the donor's head outputs z replace the receiver's, which reads them through its
own o_proj; everything above is computed anew, everything else is the receiver's clean run. Where the receiver
becomes as good as the donor, the difference between the two lies in what these heads output.

In the same way the donor's q, k or v can replace the receiver's at the nodes, and say which input of the heads makes
the difference. They are the projections' outputs, before any norm of q and k and the rotary embedding, which are then
the receiver's. Heads that share a key-value head share its k and v: those are replaced where any of them is a node.
A node's q is at its own position, but its head reads k and v at every token (`read_at`).
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.budget import MIB
from stages.circuits.circuit import Component, Node
from stages.circuits.exchange import (
    Given,
    Positions,
    Reduce,
    Sites,
    at_all_indices,
    at_positions,
    in_parts,
    layers_with,
    node_weights,
    random_weights,
    stack_positions,
    swap_in_parts,
    whole_logits,
)
from stages.circuits.walker import Run, Walker
from stages.pipeline.stage import Invalid


@torch.no_grad()
def transplant(
    receiver: Walker,
    clean: Run,
    donor: Run,
    positions: Positions,
    nodes: Collection[Node],
    memory_mib: float,
    random: Bool[Tensor, "n r layers q h"] | None = None,
    reduce: Reduce = whole_logits,
) -> Tensor:
    """The receiver with the donor's outputs at the nodes, then at r random node sets (e = 1 + r).

    Args:
        receiver: the model that is patched.
        clean: its run on the prompts.
        donor: the other model's run on the same prompts.
        positions: semantic positions of each prompt; nodes at coinciding positions are united.
        nodes: nodes to patch.
        memory_mib: how much memory passes may take, beside the two runs and what is read out.
        random: for each prompt, other nodes at the same (sorted) positions; see `random_like`.
        reduce: what is read out of the logits, see `exchange.Reduce`; by default all of them.

    Returns:
        [n e ...] on the CPU.

    Raises:
        Invalid: the models differ in their heads, the runs in their prompts, or a node or position does not exist.
    """
    found = [transplant_each(receiver, clean, donor, positions, [nodes], memory_mib, reduce)]
    if random is not None:
        names = sorted({node.position for node in nodes})
        at, random = stack_positions(positions, names), at_all_indices(random, positions, names)
        found.append(swap_in_parts(receiver, clean, at, _outputs(donor, at), random, memory_mib * MIB, reduce))
    return torch.cat(found, dim=1)


@torch.no_grad()
def transplant_each(
    receiver: Walker,
    clean: Run,
    donor: Run,
    positions: Positions,
    node_sets: Sequence[Collection[Node]],
    memory_mib: float,
    reduce: Reduce = whole_logits,
) -> Tensor:
    """The receiver with the donor's outputs at each of e node sets; arguments and errors as of `transplant`. Every set
    is computed from the earliest position and the lowest layer of all of them on.

    Returns:
        [n e ...] on the CPU.
    """
    _check_runs(clean, donor)
    names = sorted({node.position for nodes in node_sets for node in nodes})
    at = stack_positions(positions, names)
    weights = node_weights(node_sets, positions, names, receiver.n_layers, receiver.n_heads)
    return swap_in_parts(receiver, clean, at, _outputs(donor, at), weights, memory_mib * MIB, reduce)


def _outputs(donor: Run, at: Int[Tensor, "n p"]) -> Callable[[slice], Given]:
    """The donor's outputs at the sites of some prompts."""

    def given(rows: slice) -> Given:
        return lambda layer: at_positions(donor.z[layer][rows], at[rows])

    return given


@torch.no_grad()
def transplant_inputs(
    receiver: Walker,
    clean: Run,
    donor: Walker,
    donor_run: Run,
    positions: Positions,
    nodes: Collection[Node],
    component: Component | str,
    memory_mib: float,
    random: Bool[Tensor, "n r layers q h"] | None = None,
    reduce: Reduce = whole_logits,
) -> Tensor:
    """`transplant` of q, k or v of the nodes' heads instead of their outputs.

    Args:
        donor: the other model.
        donor_run: its run on the same prompts.
        component: "q", "k" or "v"; k and v are those of the key-value heads that the nodes' heads read from.

    Returns:
        [n e ...] on the CPU.

    Raises:
        Invalid: as `transplant`, or there is no such component.
    """
    _check_runs(clean, donor_run)
    if component not in tuple(Component):
        raise Invalid(f"component '{component}': must be one of {', '.join(Component)}")
    site, length, n = str(component), clean.residual.shape[2], clean.residual.shape[1]
    names = sorted({node.position for node in nodes})
    at = stack_positions(positions, names)
    weights = node_weights([nodes], positions, names, receiver.n_layers, receiver.n_heads)

    def logits(rows: slice, some: Bool[Tensor, "m e layers p h"]) -> Float[Tensor, "n e vocab"]:
        sites, layers = Sites.tail(at[rows].to(receiver.device), length, receiver.dtype), layers_with(some)
        lowest = min(layers, default=receiver.n_layers)
        if site != Component.Q:
            some = some.unflatten(-1, (receiver.n_kv_heads, -1)).any(-1)
        weights = some.to(receiver.dtype)

        def edit(layer: int, name: str, x: Tensor, first: int) -> Tensor:
            if name != site or layer not in layers:
                return x
            stream = at_positions(donor_run.residual[layer][rows], at[rows])
            other = donor.project(layer, site, stream).to(receiver.device)
            return torch.lerp(x, sites.at_slots(other, first), sites.shares(weights[:, :, layer], first))

        part = clean.select(rows)
        entering = at_positions(part.residual[lowest], sites.window.positions)
        entering = entering[:, None].expand(-1, some.shape[1], -1, -1)
        return receiver.continue_from(part, sites.window, entering, lowest, edit)

    def slots(rows: slice) -> int:
        return length - int(at[rows].min())

    def read(weights: Tensor) -> Tensor:
        return in_parts(receiver, weights, n, slots, length, memory_mib * MIB, logits, reduce)

    found = [read(weights)]
    if random is not None:
        found.append(read(at_all_indices(random, positions, names)))
    return torch.cat(found, dim=1)


def read_at(
    nodes: Collection[Node], component: Component | str, positions: Positions, n: int, length: int
) -> tuple[frozenset[Node], Positions]:
    """Nodes and positions with which `transplant_inputs` replaces all that the nodes' heads read of a component.

    That is q at the nodes' own positions. Of k and v it is every token, since a head at the last one looks at others:
    its own k and v there say next to nothing of what it does. Prakash et al. exchange those of all earlier tokens, too;
    here the head also reads them where it is no node.

    Args:
        nodes: nodes of whose heads the input is replaced.
        component: "q", "k" or "v".
        positions: semantic positions of each of n prompts of so many tokens.
    """
    if component == Component.Q:
        return frozenset(nodes), positions
    every = torch.arange(length, device="cpu").expand(n, length)
    return frozenset(Node(node.layer, node.head, "every_token") for node in nodes), {"every_token": every}


def random_like(
    nodes: Collection[Node], n: int, draws: int, n_layers: int, n_heads: int, generator: np.random.Generator
) -> Bool[Tensor, "n draws layers q h"]:
    """For each of n prompts, `draws` random node sets with as many nodes per (sorted) position as given."""
    names = sorted({node.position for node in nodes})
    counts = [sum(node.position == name for node in set(nodes)) for name in names]
    return torch.cat([random_weights(n, counts, n_layers, n_heads, generator) for _ in range(draws)], dim=1)


def _check_runs(clean: Run, donor: Run) -> None:
    if donor.z.shape != clean.z.shape:
        raise Invalid(
            f"head outputs of the donor have shape {list(donor.z.shape)}, of the receiver {list(clean.z.shape)}: must "
            "be two models of one architecture on the same prompts"
        )
