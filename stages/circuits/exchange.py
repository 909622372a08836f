"""Runs in which chosen head outputs z are exchanged for others: the operation behind ablation, DCM and CMAP.

1. Some semantic positions of every example, such as the last token and the queried clause's separator, are
   the *sites*.
2. Each head at each site gets a weight w, and its output becomes (1 - w) z + w z', where z is what the head
   computes in this very run (so it feels exchanges below it) and z' is given: a mean, or the output in
   another prompt or model.
3. Only the positions that can change are computed (see `walker`): either the sites alone, when every other
   position is known not to depend on the weights, or everything from the earliest site on.

Shapes as in `walker`, with p sites; m is n, or 1 where all examples share their weights.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.checks import check_heads, check_name, check_sites
from stages.circuits.circuit import Node
from stages.circuits.walker import Run, Walker, Window
from stages.pipeline.stage import Invalid

# Semantic position -> its index in each prompt, or its indices. A node at a position with several of them is the head
# at all of them: a head at a clause's label cannot know which clause will be asked for, and does what it does in each.
Positions = Mapping[str, Int[Tensor, "n ..."]]


@dataclass(frozen=True)
class Sites:
    """Semantic positions and the window slots that hold them.

    Attributes:
        positions: of the sites.
        window: the positions that are computed.
        holds: 1 where a slot holds a site; two sites may share a slot.
        site: a site that the slot holds, 0 where it holds none.
    """

    positions: Int[Tensor, "n p"]
    window: Window
    holds: Float[Tensor, "n s p"]
    site: Int[Tensor, "n s"]

    @staticmethod
    def alone(positions: Int[Tensor, "n p"], length: int, dtype: torch.dtype = torch.float32) -> "Sites":
        """Only the sites are computed; one of them must be the last position of the prompt.

        Raises:
            Invalid: a position is outside the prompt, or the last one is missing.
        """
        check_sites(positions, length)
        if bool((positions.max(dim=1).values != length - 1).any()):
            raise Invalid(f"sites must include the last position of every prompt, {length - 1}")
        slots = positions.sort(dim=1).values
        live = torch.ones_like(slots, dtype=torch.bool)
        live[:, :-1] = slots[:, :-1] != slots[:, 1:]  # of coinciding sites one slot counts, the later one
        return Sites._of(Window.scattered(slots, length, live, dtype), positions, dtype)

    @staticmethod
    def tail(positions: Int[Tensor, "n p"], length: int, dtype: torch.dtype = torch.float32) -> "Sites":
        """Every position is computed from the earliest site of all examples on.

        Raises:
            Invalid: a position is outside the prompt.
        """
        check_sites(positions, length)
        start = int(positions.min())
        return Sites._of(Window.tail(len(positions), start, length, dtype), positions, dtype)

    @staticmethod
    def _of(window: Window, positions: Int[Tensor, "n p"], dtype: torch.dtype) -> "Sites":
        holds = window.positions[:, :, None] == positions[:, None, :]
        return Sites(positions, window, holds.to(dtype), holds.int().argmax(-1))


def stack_positions(positions: Positions, names: Sequence[str]) -> Int[Tensor, "n p"]:
    """All indices of the named positions, name by name, as one tensor.

    Raises:
        Invalid: the prompts have no such position.
    """
    for name in names:
        check_name(name, positions)
    return torch.cat([positions[name][..., None].flatten(1) for name in names], dim=1)


def at_all_indices(
    weights: Bool[Tensor, "m e layers q h"], positions: Positions, names: Sequence[str]
) -> Bool[Tensor, "m e layers p h"]:
    """Weights of the q named positions as weights of their p indices, in the order of `stack_positions`."""
    indices = torch.tensor([positions[name][0].numel() for name in names])
    return weights.repeat_interleave(indices, dim=3)


def node_weights(
    node_sets: Sequence[Iterable[Node]], positions: Positions, names: Sequence[str], n_layers: int, n_heads: int
) -> Bool[Tensor, "1 e layers p h"]:
    """True at the nodes of each set at the p indices of the named positions, in the order of `stack_positions`; one
    variant per set, for all examples alike.

    Raises:
        Invalid: a node is outside the model, or at none of the named positions.
    """
    weights = torch.zeros(1, len(node_sets), n_layers, len(names), n_heads, dtype=torch.bool)
    for variant, nodes in enumerate(node_sets):
        for node in nodes:
            check_name(node.position, names)
            check_heads([(node.layer, node.head)], n_layers, n_heads, "node")
            weights[0, variant, node.layer, names.index(node.position), node.head] = True
    return at_all_indices(weights, positions, names)


def random_nodes(nodes: Iterable[Node], n_layers: int, n_heads: int, generator: np.random.Generator) -> frozenset[Node]:
    """As many nodes per position as given, drawn without replacement from all heads of that position."""
    counts: dict[str, int] = {}
    for node in set(nodes):
        counts[node.position] = counts.get(node.position, 0) + 1
    drawn = set()
    for position in sorted(counts):
        for index in generator.choice(n_layers * n_heads, size=counts[position], replace=False):
            drawn.add(Node(int(index) // n_heads, int(index) % n_heads, position))
    return frozenset(drawn)


def random_weights(
    n: int, counts: Sequence[int], n_layers: int, n_heads: int, generator: np.random.Generator
) -> Bool[Tensor, "n 1 layers p h"]:
    """A random node set for each of n examples: `counts` nodes at the p sites, without replacement."""
    weights = torch.zeros(n, len(counts), n_layers * n_heads, dtype=torch.bool)
    for site, count in enumerate(counts):
        drawn = generator.random((n, n_layers * n_heads)).argsort(axis=1)[:, :count]
        weights[:, site].scatter_(1, torch.from_numpy(drawn), True)
    return weights.unflatten(-1, (n_layers, n_heads)).transpose(1, 2)[:, None]


def outputs_at(z: Float[Tensor, "layers n t h a"], positions: Int[Tensor, "n p"]) -> Float[Tensor, "layers n p h a"]:
    """Head outputs at chosen positions of each example."""
    return z[:, torch.arange(len(positions))[:, None], positions]


def exchange(
    walker: Walker,
    run: Run,
    sites: Sites,
    given: Float[Tensor, "layers n p h a"],
    weights: Float[Tensor, "m e layers p h"] | Bool[Tensor, "m e layers p h"],
    layers: Collection[int] | None = None,
    ablated: bool = False,
) -> Float[Tensor, "n e vocab"]:
    """Logits at the last position when head outputs at the sites are exchanged for given ones.

    Args:
        walker: the model.
        run: the run that the other positions, and the layers below the exchange, are taken from.
        sites: where heads are exchanged.
        given: the outputs z' to write.
        weights: how much of z' each head gets at each site; where sites coincide, the sum, at most 1.
        layers: layers that the weights may touch; if None, those with a weight that is not 0.
        ablated: `run` itself has z' everywhere, and the weights say how much of its own z a head keeps.
    """
    if layers is None:
        layers = (weights != 0).transpose(0, 2).flatten(1).any(1).nonzero()[:, 0].tolist()
    lowest = min(layers, default=walker.n_layers)
    rows = torch.arange(len(sites.site))[:, None]
    weights = weights.to(walker.dtype)

    def edit(layer: int, name: str, x: Tensor, first: int) -> Tensor:
        if name != "z" or not (ablated or layer in layers):
            return x
        other = given[layer][rows, sites.site[:, first:]][:, None]  # n 1 s h a
        holds = sites.holds[:, None, first:]  # n 1 s p
        share = (holds @ weights[:, :, layer]).clamp(max=1)[..., None]  # n e s h 1
        return torch.lerp(other, x, share) if ablated else torch.lerp(x, other, share)

    # in the lowest layer nothing but the sites themselves can change
    start = lowest if ablated or not layers else lowest + 1
    entering = run.residual[start][rows, sites.window.positions]
    entering = entering[:, None].expand(-1, weights.shape[1], -1, -1)
    if start > lowest:
        changed = _after_exchange(walker, run, sites, given[lowest], weights[:, :, lowest], lowest)
        slots = sites.positions - sites.window.positions[:, :1]  # the window is a tail
        entering = entering.scatter(2, slots[:, None, :, None].expand_as(changed), changed)
    return walker.continue_from(run, sites.window, entering, start, edit)


def _after_exchange(
    walker: Walker,
    run: Run,
    sites: Sites,
    given: Float[Tensor, "n p h a"],
    weights: Float[Tensor, "m e p h"],
    layer: int,
) -> Float[Tensor, "n e p d"]:
    """The residual stream at the sites after the first layer with an exchange."""
    at, rows = sites.positions, torch.arange(len(sites.positions))[:, None]
    together = (at[:, :, None] == at[:, None, :]).to(walker.dtype)[:, None]  # n 1 p p
    share = (together @ weights).clamp(max=1)[..., None]  # n e p h 1
    z = torch.lerp(run.z[layer][rows, at][:, None], given[:, None], share)
    return walker.after_attention(layer, run.residual[layer][rows, at][:, None], walker.attention_output(layer, z))


def exchange_in_parts(
    walker: Walker,
    run: Run,
    sites: Sites,
    given: Float[Tensor, "layers n p h a"],
    weights: Float[Tensor, "m e layers p h"] | Bool[Tensor, "m e layers p h"],
    memory_mib: float,
    ablated: bool = False,
) -> Float[Tensor, "n e vocab"]:
    """`exchange`, with as many variants at once as fit the memory."""
    n, s = sites.site.shape
    fit = rows_that_fit(walker, s, run.keys.shape[-2], memory_mib) // n
    parts = weights.split(max(1, fit), dim=1)
    return torch.cat([exchange(walker, run, sites, given, part, None, ablated) for part in parts], dim=1)


def rows_that_fit(walker: Walker, slots: int, length: int, memory_mib: float) -> int:
    """How many prompts a pass may hold at once: a rough count of its working set, at least 1."""
    heads = walker.n_heads * walker.head_dim
    slot = 4 * walker.width + 3 * walker.mlp_width + 4 * heads + 3 * walker.n_heads * length
    needed = slots * slot * walker.dtype.itemsize + walker.vocab_size * walker.logits_dtype.itemsize
    return max(1, int(memory_mib * 2**20) // needed)


def by_earliest(positions: Int[Tensor, "n p"]) -> Int[Tensor, " n"]:
    """An order of the examples in which neighbours have similar first sites, for short tails."""
    return positions.min(dim=1).values.argsort(stable=True)


def slices(n: int, size: int) -> list[slice]:
    """Consecutive slices of n examples, each of at most `size`."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
