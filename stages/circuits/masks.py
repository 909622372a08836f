"""Desiderata-based component masking (DCM): what do the heads of a group carry?

Source: Davies et al., "Discovering variable binding circuitry with desiderata" (2023); Prakash et al., ICLR
2024, section 5. A desideratum is a set of pairs (base prompt, source prompt, target): if a group carries the
desired information, then writing its outputs from the source prompt into the base prompt must make the model
answer the target.

1. Every head of the group gets a mask value w in [0, 1]. In the base prompt its output becomes
   w z + (1 - w) z_source at the group's position; z_source comes from the source's own such position. (The
   paper starts from w = 1. There a head that has to be swapped whole before the answer moves gets hardly any
   gradient, and training can end in a bad optimum; from `start=0.5` it found the same heads each time.)
2. The loss, minus the log-probability of the target plus sparsity * sum(1 - w), is minimised by Adam with w
   clamped after each step. (The paper maximises the raw logit of the target, which can be had as
   `objective="logit"`. A logit also grows without bound after the answer is won, so heads that no longer
   change any answer go on being swapped; the log-probability saturates, and the sparsity term can then take
   them out.)
3. The heads, ordered by their mask, form nested sets: none, the first, the first two, ... On other pairs the
   fewest heads whose accuracy is within a tolerance of the best are selected.
4. On further pairs the accuracy of that set is reported, next to no heads (the floor), all heads of the
   group, and, as a control, as many random heads at the same position, drawn anew for every pair.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.budget import MIB, making_bytes, outputs_bytes, pass_bytes, rows_that_fit, run_bytes
from stages.circuits.checks import check_tokens
from stages.circuits.circuit import Group, Node
from stages.circuits.desiderata_pairs import Desideratum, PairTable
from stages.circuits.exchange import Given, node_weights, random_weights, slices, swap_in_parts
from stages.circuits.mask_training import MaskSettings, RankedHeads, mask_orders
from stages.circuits.walker import Walker
from stages.pipeline.processes import in_processes
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class Carried:
    """How well swapping heads of a group moves the answer to the target of a desideratum.

    Attributes:
        selected: the (layer, head) pairs that the mask selects, strongest first.
        order: all heads of the group in the order of the mask; the selected ones are its first.
        size: number of heads of the whole group.
        accuracy: share of test pairs answered with the target when the selected heads are swapped.
        floor: the same with nothing swapped.
        all_heads_accuracy: the same with the whole group swapped.
        random_accuracy: the same with `size` random heads at the group's position, others for each pair.
        n_test: number of test pairs.
    """

    selected: RankedHeads
    order: RankedHeads
    size: int
    accuracy: float
    floor: float
    all_heads_accuracy: float
    random_accuracy: float
    n_test: int


@dataclass(frozen=True)
class Swapped:
    """Heads of a group that are swapped in the pairs of a desideratum.

    Attributes:
        heads: (layer, head) pairs; None: as many random ones as the group has, others for each pair.
    """

    group: str
    desideratum: str
    heads: frozenset[tuple[int, int]] | None


def component_masks(
    walker: Walker,
    train: Mapping[str, Desideratum],
    selection: Mapping[str, Desideratum],
    test: Mapping[str, Desideratum],
    groups: Sequence[Group],
    settings: MaskSettings,
    generator: np.random.Generator,
    advance: Callable[[str], None] = lambda what: None,
    processes: int = 1,
) -> dict[tuple[str, str], Carried]:
    """What each group carries, for each desideratum: (group, desideratum) -> result.

    Args:
        walker: the model.
        train: pairs of each desideratum, for the masks.
        selection: other pairs of the same desiderata, for the number of heads.
        test: further pairs, for the accuracies.
        groups: groups of a circuit.
        settings: see `MaskSettings`.
        generator: draws the random heads of the control.
        advance: called with what was finished: once a group, then for the selection and for the accuracies.
        processes: how many to spread the groups, then the pairs over.

    Raises:
        Invalid: a target is not a token of the model, or a position does not exist.
    """
    for pairs in (train, selection, test):
        for name, entry in pairs.items():
            check_tokens(entry.target[:, None], walker.vocab_size, None, f"the target of '{name}'")
    orders = mask_orders(walker, train, groups, settings, advance, processes)
    nested = [
        Swapped(group, name, frozenset(order[:count]))
        for (group, name), order in orders.items()
        for count in range(len(order) + 1)
    ]
    memory = settings.memory_mib
    found = swap_accuracies(walker, selection, groups, nested, memory, None, processes)
    advance("heads selected")
    chosen: dict[tuple[str, str], RankedHeads] = {}
    for (group, name), order in orders.items():
        accuracies = [found[Swapped(group, name, frozenset(order[:count]))] for count in range(len(order) + 1)]
        chosen[group, name] = order[: fewest_enough(accuracies, settings.tolerance)]
    final = [
        Swapped(group, name, heads)
        for (group, name), order in orders.items()
        for heads in (frozenset(), frozenset(chosen[group, name]), frozenset(order), None)
    ]
    found = swap_accuracies(walker, test, groups, final, memory, generator, processes)
    advance("accuracies")
    return {
        (group, name): Carried(
            selected=chosen[group, name],
            order=order,
            size=len(order),
            accuracy=found[Swapped(group, name, frozenset(chosen[group, name]))],
            floor=found[Swapped(group, name, frozenset())],
            all_heads_accuracy=found[Swapped(group, name, frozenset(order))],
            random_accuracy=found[Swapped(group, name, None)],
            n_test=len(test[name].target),
        )
        for (group, name), order in orders.items()
    }


def swap_accuracies(
    walker: Walker,
    pairs: Mapping[str, Desideratum],
    groups: Sequence[Group],
    swapped: Sequence[Swapped],
    memory_mib: float,
    generator: np.random.Generator | None = None,
    processes: int = 1,
) -> dict[Swapped, float]:
    """Shares of pairs answered with the target when heads at a group's position are swapped.

    Args:
        walker: the model.
        pairs: of each desideratum.
        groups: give the positions.
        swapped: what to swap; without heads it is the floor.
        memory_mib: how much memory each process may take beside the model.
        generator: draws random heads, if any are asked for.
        processes: how many to spread the pairs over.
    """
    tables = {
        name: PairTable.of([entry], sorted({group.position for group in groups})) for name, entry in pairs.items()
    }
    asked = {
        name: [_Question.of(walker, table, group, name, swapped, generator) for group in groups]
        for name, table in tables.items()
    }
    # random heads are of any layer
    highest = None if generator is not None else max(layer for group in groups for layer, _ in group.heads)
    layers = walker.n_layers if highest is None else highest + 1
    parts: list[tuple[str, slice]] = []
    for name, table in tables.items():
        length = table.base_ids.shape[1]
        of_source = layers * len(table.source_positions) * walker.n_heads * walker.head_dim * walker.dtype.itemsize
        each = max(outputs_bytes(walker, table.source_ids.shape[1]), making_bytes(walker, length)) + 2 * of_source
        fit = rows_that_fit(walker, each, memory_mib * MIB, pass_bytes(walker, length, length))
        parts += [(name, rows) for rows in slices(len(table), fit)]

    @torch.no_grad()
    def hits_of(part: tuple[str, slice]) -> Int[Tensor, " counts"]:
        """Hits with nothing swapped, then those of every set of every group."""
        table, rows = tables[part[0]], part[1]
        sources = table.source_outputs(walker, rows, layers)
        base = table.base_run(walker, rows)
        n, length = base.residual.shape[1:3]
        left = memory_mib * MIB - n * run_bytes(walker, length) - sum(source.nbytes for source in sources.values())
        target = table.target[rows].to(walker.device)
        found = [(base.logits.argmax(-1) == target).sum()[None].cpu()]
        for question in asked[part[0]]:
            if not question.swapped:
                continue
            name = question.group.position

            def given(some: slice, source: Tensor = sources[name]) -> Given:
                return lambda layer: source[layer][some, None]

            def hits(logits: Float[Tensor, "n e vocab"], some: slice, target: Tensor = target) -> Bool[Tensor, "n e"]:
                return logits.argmax(-1) == target[some, None]

            at, weights = table.base_positions[name][rows, None], question.weights(rows)
            found.append(swap_in_parts(walker, base, at, given, weights, left, hits).sum(0))
        return torch.cat(found)

    hits = {name: torch.zeros((), dtype=torch.long, device="cpu") for name in tables}
    for (name, _), some in zip(parts, in_processes(hits_of, parts, processes), strict=True):
        hits[name] = hits[name] + some
    found: dict[Swapped, float] = {}
    for name, table in tables.items():
        floor, *rest = (count / len(table) for count in hits[name].tolist())
        found |= {swap: floor for swap in swapped if swap.desideratum == name and swap.heads == frozenset()}
        found |= dict(zip([swap for question in asked[name] for swap in question.swapped], rest, strict=True))
    return found


@dataclass(frozen=True)
class _Question:
    """The sets of heads of one group that are swapped in the pairs of one desideratum, in the order of the variants."""

    group: Group
    swapped: Sequence[Swapped]
    fixed: Bool[Tensor, "1 e layers 1 h"]
    random: Bool[Tensor, "n 1 layers 1 h"] | None

    @staticmethod
    def of(
        walker: Walker,
        table: PairTable,
        group: Group,
        desideratum: str,
        swapped: Sequence[Swapped],
        generator: np.random.Generator | None,
    ) -> "_Question":
        own = {swap for swap in swapped if (swap.group, swap.desideratum) == (group.name, desideratum)}
        shape, name = (walker.n_layers, walker.n_heads), group.position
        sets = sorted({swap.heads for swap in own if swap.heads}, key=sorted)
        nodes = [[Node(layer, head, name) for layer, head in heads] for heads in sets]
        fixed = node_weights(nodes, table.base_positions, [name], *shape)
        order = [Swapped(group.name, desideratum, heads) for heads in sets]
        if not any(swap.heads is None for swap in own):
            return _Question(group, order, fixed, None)
        if generator is None:
            raise Invalid(f"random heads of group '{group.name}' are asked for without a generator: must be given one")
        random = random_weights(len(table), [len(group.heads)], *shape, generator)
        return _Question(group, [*order, Swapped(group.name, desideratum, None)], fixed, random)

    def weights(self, rows: slice) -> Bool[Tensor, "m e layers 1 h"]:
        """Of some of the pairs."""
        if self.random is None:
            return self.fixed
        random = self.random[rows]
        return torch.cat([self.fixed.expand(len(random), -1, -1, -1, -1), random], 1)


def fewest_enough(accuracies: Sequence[float], tolerance: float) -> int:
    """How many heads to select: the fewest whose accuracy is within the tolerance of the best.

    Args:
        accuracies: of the nested sets of 0, 1, 2, ... heads.
        tolerance: 0 leaves only ties, which go to fewer heads.
    """
    enough = max(accuracies) - tolerance - 1e-12
    return next(count for count, accuracy in enumerate(accuracies) if accuracy >= enough)
