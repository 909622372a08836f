"""Runs in which chosen head outputs z are exchanged for others: the operation behind ablation, DCM and CMAP.

1. Some semantic positions of every example are the *sites*.
2. `swap`: each head at each site has a weight w, and its output becomes (1 - w) z + w z', where z is what the head
   computes in this very pass (so it feels exchanges below it) and z' is given: a mean, or the output in another prompt
   or model. `keep`: every head at every site gives z' except that it keeps the share w of its own z.
3. Only the positions that can change are computed (see `walker`): either the sites alone, when every other
   position is known not to depend on the weights, or everything from the earliest site on.
4. What is wanted of the logits is read out part by part, of as many variants and examples as fit the memory, so that
   logits of all of them never exist at once.

Shapes as in `walker`, with p sites; m is n, or 1 where all examples share their weights. Positions and what is read out
are on the CPU, everything else is on the device of the model.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.budget import pass_bytes, rows_that_fit
from stages.circuits.checks import check_heads, check_name, check_sites
from stages.circuits.circuit import Node
from stages.circuits.walker import Prefix, Run, Walker, Window
from stages.pipeline.stage import Invalid

# Semantic position -> its index in each prompt, or its indices. A node at a position with several of them is the head
# at all of them: at every token of a name of several tokens, or at the same token of every clause.
Positions = Mapping[str, Int[Tensor, "n ..."]]

# reduce(logits, rows): what is wanted of the logits [n e vocab] of some examples, which are `rows` of those that the
# caller has, in some variants. Returns [n e ...], on any device.
Reduce = Callable[[Float[Tensor, "n e vocab"], slice], Tensor]

# given(layer): head outputs z' at the sites in that layer.
Given = Callable[[int], Float[Tensor, "n p h a"]]


def whole_logits(logits: Float[Tensor, "n e vocab"], rows: slice) -> Float[Tensor, "n e vocab"]:
    """A `Reduce` that keeps everything; only for few variants of few examples."""
    return logits


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
        window = Window.tail(len(positions), int(positions.min()), length, dtype, positions.device)
        return Sites._of(window, positions, dtype)

    @staticmethod
    def _of(window: Window, positions: Int[Tensor, "n p"], dtype: torch.dtype) -> "Sites":
        holds = window.positions[:, :, None] == positions[:, None, :]
        return Sites(positions, window, holds.to(dtype), holds.int().argmax(-1))

    def shares(self, weights: Float[Tensor, "m e p heads"], first: int = 0) -> Float[Tensor, "#n e s heads 1"]:
        """Weights at the sites as weights in the window slots from `first` on; where sites coincide, their sum."""
        return (self.holds[:, None, first:] @ weights).clamp(max=1)[..., None]

    def at_slots(self, given: Float[Tensor, "n p *rest"], first: int = 0) -> Float[Tensor, "n 1 s *rest"]:
        """What is given at the sites, in the window slots from `first` on (anything in slots that hold none)."""
        rows = torch.arange(len(self.site), device=self.site.device)[:, None]
        return given[rows, self.site[:, first:]][:, None]


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
    """Weights of the q named positions as weights of their p indices, in the order of `stack_positions`.

    Raises:
        Invalid: the prompts have no such position.
    """
    for name in names:
        check_name(name, positions)
    indices = torch.tensor([positions[name][0].numel() for name in names], dtype=torch.long, device=weights.device)
    return weights.repeat_interleave(indices, dim=3)


def node_weights(
    node_sets: Sequence[Iterable[Node]], positions: Positions, names: Sequence[str], n_layers: int, n_heads: int
) -> Bool[Tensor, "1 e layers p h"]:
    """True at the nodes of each set at the p indices of the named positions, in the order of `stack_positions`; one
    variant per set, for all examples alike.

    Raises:
        Invalid: a node is outside the model, or at none of the named positions.
    """
    weights = torch.zeros(1, len(node_sets), n_layers, len(names), n_heads, dtype=torch.bool, device="cpu")
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
    weights = torch.zeros(n, len(counts), n_layers * n_heads, dtype=torch.bool, device="cpu")
    for site, count in enumerate(counts):
        drawn = generator.random((n, n_layers * n_heads)).argsort(axis=1)[:, :count]
        weights[:, site].scatter_(1, torch.from_numpy(drawn), True)
    return weights.unflatten(-1, (n_layers, n_heads)).transpose(1, 2)[:, None]


def at_positions(x: Float[Tensor, "n t *rest"], positions: Int[Tensor, "n p"]) -> Float[Tensor, "n p *rest"]:
    """A stream, or head outputs, at chosen positions of each example."""
    return x[torch.arange(len(positions), device=x.device)[:, None], positions.to(x.device)]


@dataclass(frozen=True)
class Start:
    """What a pass from the earliest site on takes over from a run; less than the run, so it can be kept for many.

    Attributes:
        layer: the lowest one with an exchange, or the number of layers; nothing changes below it.
        entering: the residual stream that enters it at the sites; None where no layer has an exchange.
        z: its head outputs at the sites, likewise.
        leaving: the stream that leaves it in the window slots (that enters the final norm if there is no exchange).
        background: has the keys and values that the window sees.
    """

    layer: int
    entering: Float[Tensor, "n p d"] | None
    z: Float[Tensor, "n p h a"] | None
    leaving: Float[Tensor, "n s d"]
    background: Prefix | Run

    @staticmethod
    def of(run: Run, sites: Sites, layer: int) -> "Start":
        """What is needed of a run on the same examples."""
        window = sites.window.positions
        if layer == len(run.z):
            return Start(layer, None, None, at_positions(run.residual[layer], window), run)
        entering, z = (at_positions(x[layer], sites.positions) for x in (run.residual, run.z))
        return Start(layer, entering, z, at_positions(run.residual[layer + 1], window), run)

    def compact(self, sites: Sites) -> "Start":
        """The same without a hold on the run: keys and values are copied as far as the window sees them."""
        seen = sites.window.sees_background.shape[-1]
        keys, values = (x[..., :seen, :].clone() for x in (self.background.keys, self.background.values))
        return replace(self, background=Prefix(keys, values))


def layers_with(weights: Tensor) -> list[int]:
    """Layers in which some weight [m e layers p h] is not 0."""
    return (weights != 0).transpose(0, 2).flatten(1).any(1).nonzero()[:, 0].tolist()


def swap(
    walker: Walker,
    start: Start,
    sites: Sites,
    given: Given,
    weights: Float[Tensor, "m e layers p h"],
    layers: Collection[int],
) -> Float[Tensor, "n e vocab"]:
    """Logits at the last position when heads at the sites get other outputs, all else being live.

    Args:
        walker: the model.
        start: of a run on the examples, at the lowest of the layers.
        sites: where heads are exchanged, with everything after them (`Sites.tail`).
        given: the outputs z' to write.
        weights: how much of z' each head gets at each site; where sites coincide, the sum, at most 1.
        layers: layers that the weights may touch.
    """

    def edit(layer: int, name: str, x: Tensor, first: int) -> Tensor:
        if name != "z" or layer not in layers:
            return x
        return torch.lerp(x, sites.at_slots(given(layer), first), sites.shares(weights[:, :, layer], first))

    entering = start.leaving[:, None].expand(-1, weights.shape[1], -1, -1)
    if start.entering is None or start.z is None:
        return walker.continue_from(start.background, sites.window, entering, start.layer, edit)
    # in the lowest layer nothing but the sites themselves can change
    at = sites.positions
    together = (at[:, :, None] == at[:, None, :]).to(walker.dtype)[:, None]  # n 1 p p
    share = (together @ weights[:, :, start.layer]).clamp(max=1)[..., None]  # n e p h 1
    z = torch.lerp(start.z[:, None], given(start.layer)[:, None], share)
    attention = walker.attention_output(start.layer, z)
    changed = walker.after_attention(start.layer, start.entering[:, None], attention)
    slots = at - sites.window.positions[:, :1]  # the window is a tail
    entering = entering.scatter(2, slots[:, None, :, None].expand_as(changed), changed)
    return walker.continue_from(start.background, sites.window, entering, start.layer + 1, edit)


def keep(
    walker: Walker,
    background: Run,
    sites: Sites,
    given: Given,
    weights: Float[Tensor, "m e layers p h"],
) -> Float[Tensor, "n e vocab"]:
    """Logits at the last position when heads keep their own outputs, all others at the sites giving z'.

    Args:
        walker: the model.
        background: a run in which every head gives z' everywhere.
        sites: the only positions that are computed (`Sites.alone`).
        given: the outputs z'.
        weights: how much of its own output each head keeps at each site; where sites coincide, the sum, at most 1.
    """
    lowest = min(layers_with(weights), default=walker.n_layers)

    def edit(layer: int, name: str, x: Tensor, first: int) -> Tensor:
        if name != "z":
            return x
        return torch.lerp(sites.at_slots(given(layer), first), x, sites.shares(weights[:, :, layer], first))

    entering = at_positions(background.residual[lowest], sites.window.positions)
    entering = entering[:, None].expand(-1, weights.shape[1], -1, -1)
    return walker.continue_from(background, sites.window, entering, lowest, edit)


def swap_in_parts(
    walker: Walker,
    run: Run,
    positions: Int[Tensor, "n p"],
    given: Callable[[slice], Given],
    weights: Bool[Tensor, "m e layers p h"],
    memory: float,
    reduce: Reduce,
) -> Tensor:
    """`swap` for as many variants and examples at once as fit.

    Examples that stand in the order of their earliest site (`by_earliest`) take the least time.

    Args:
        walker: the model.
        run: its run on the examples.
        positions: of the sites.
        given: the outputs z' of some of the examples.
        weights: heads that get them.
        memory: bytes that passes may take; the run and the results are not counted.
        reduce: see `Reduce`.

    Returns:
        what `reduce` gives, for all examples and variants, [n e ...], on the CPU.
    """
    length = run.residual.shape[2]

    def logits(rows: slice, some: Tensor) -> Tensor:
        sites = Sites.tail(positions[rows].to(walker.device), length, walker.dtype)
        layers = layers_with(some)
        start = Start.of(run.select(rows), sites, min(layers, default=walker.n_layers))
        return swap(walker, start, sites, given(rows), some.to(walker.dtype), layers)

    def slots(rows: slice) -> int:
        return length - int(positions[rows].min())

    return in_parts(walker, weights, len(positions), slots, length, memory, logits, reduce)


def keep_in_parts(
    walker: Walker,
    background: Run,
    positions: Int[Tensor, "n p"],
    given: Callable[[slice], Given],
    weights: Bool[Tensor, "m e layers p h"],
    memory: float,
    reduce: Reduce,
) -> Tensor:
    """`keep` for as many variants and examples at once as fit; arguments and result as of `swap_in_parts`."""
    length = background.residual.shape[2]

    def logits(rows: slice, some: Tensor) -> Tensor:
        sites = Sites.alone(positions[rows].to(walker.device), length, walker.dtype)
        part = background.select(rows)
        return keep(walker, part, sites, given(rows), some.to(walker.dtype))

    slots = positions.shape[1]
    return in_parts(walker, weights, len(positions), lambda rows: slots, length, memory, logits, reduce)


def in_parts(
    walker: Walker,
    weights: Tensor,
    n: int,
    slots: Callable[[slice], int],
    length: int,
    memory: float,
    logits: Callable[[slice, Tensor], Float[Tensor, "n e vocab"]],
    reduce: Reduce,
) -> Tensor:
    """What is read out of passes of n examples in e variants, part by part.

    Args:
        walker: the model.
        weights: of the variants, [m e ...] with m = n or 1.
        n: number of examples.
        slots: how many window slots a pass over some of the examples has.
        length: of the prompts.
        memory: bytes that a pass may take.
        logits: of some examples with some variants, whose weights are on the device of the model.
        reduce: see `Reduce`.
    """
    everything = slice(0, n)
    at_once = rows_that_fit(walker, pass_bytes(walker, slots(everything), length), memory)
    found = []
    for rows in slices(n, at_once):
        fit = rows_that_fit(walker, pass_bytes(walker, slots(rows), length), memory) // (rows.stop - rows.start)
        of_rows = weights if len(weights) == 1 else weights[rows]
        some = [reduce(logits(rows, part.to(walker.device)), rows).cpu() for part in of_rows.split(max(1, fit), dim=1)]
        found.append(torch.cat(some, dim=1))
    return torch.cat(found)


def by_earliest(positions: Int[Tensor, "n p"]) -> Int[Tensor, " n"]:
    """An order of the examples in which neighbours have similar first sites, for short tails."""
    return positions.min(dim=1).values.argsort(stable=True)


def slices(n: int, size: int) -> list[slice]:
    """Consecutive slices of n examples, each of at most `size`."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
