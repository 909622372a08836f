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

Only positions from the earliest site on and layers from the group's lowest on are computed; the rest comes
from the clean base run, and gradients run through that tail only. All desiderata of a group are trained in
one batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.checks import check_name, check_positions, check_tokens
from stages.circuits.circuit import Group, Node
from stages.circuits.exchange import (
    Sites,
    exchange,
    exchange_in_parts,
    node_weights,
    outputs_at,
    random_weights,
    rows_that_fit,
    slices,
)
from stages.circuits.walker import Run, Walker
from stages.pipeline.processes import in_processes

# Rows of a pass while masks are trained: fewer waste time between the operations, more make tails longer than needed.
TAIL_ROWS = 16

# set of heads, or "random" ones -> share of the pairs answered with the target
Accuracies = dict[frozenset[tuple[int, int]] | str, float]

Heads = tuple[tuple[int, int], ...]  # (layer, head) pairs


@runtime_checkable
class Desideratum(Protocol):
    """AlignedPairs of base and source prompts; `target` is the answer that the desideratum asks for."""

    @property
    def base_ids(self) -> Int[Tensor, "n t"]: ...
    @property
    def source_ids(self) -> Int[Tensor, "n s"]: ...
    @property
    def target(self) -> Int[Tensor, " n"]: ...
    @property
    def base_positions(self) -> Mapping[str, Int[Tensor, " n"]]: ...
    @property
    def source_positions(self) -> Mapping[str, Int[Tensor, " n"]]: ...


@dataclass(frozen=True)
class MaskSettings:
    """How masks are trained and selected.

    Attributes:
        steps: steps of Adam.
        batch: pairs of each desideratum per step.
        learning_rate: of Adam.
        start: mask value that training starts from, the same for all heads.
        sparsity: price of swapping one head, in the unit of the objective.
        objective: "log_probability" of the target, or its raw "logit".
        tolerance: how much accuracy on the selection pairs a smaller set of heads may give away.
        memory_mib: how much memory a pass may take, roughly.
    """

    steps: int
    batch: int
    learning_rate: float
    start: float
    sparsity: float
    objective: str
    tolerance: float
    memory_mib: float


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

    selected: Heads
    order: Heads
    size: int
    accuracy: float
    floor: float
    all_heads_accuracy: float
    random_accuracy: float
    n_test: int


@dataclass(frozen=True)
class PairRuns:
    """Clean base runs and source outputs of n pairs of several desiderata.

    Attributes:
        base: clean runs of the base prompts.
        positions: positions of the sites in the base prompts.
        source: head outputs of the source prompts at their own sites, up to the highest layer that is swapped.
        target: token that the desideratum asks for.
        desideratum: index of the desideratum of each pair.
    """

    base: Run
    positions: Mapping[str, Int[Tensor, " n"]]
    source: Mapping[str, Float[Tensor, "layers n h a"]]
    target: Int[Tensor, " n"]
    desideratum: Int[Tensor, " n"]

    def at(self, position: str, part: slice) -> tuple[Run, Sites, Float[Tensor, "layers n 1 h a"]]:
        """What an exchange at one site needs for some pairs: base run, sites, outputs of the source."""
        base = self.base.select(part)
        sites = Sites.tail(self.positions[position][part, None], base.keys.shape[-2], base.keys.dtype)
        return base, sites, self.source[position][:, part, None]


@dataclass(frozen=True)
class PairTable:
    """The pairs of several desiderata in the order of their earliest site, so that tails are short."""

    base_ids: Int[Tensor, "n t"]
    source_ids: Int[Tensor, "n s"]
    target: Int[Tensor, " n"]
    base_positions: Mapping[str, Int[Tensor, " n"]]
    source_positions: Mapping[str, Int[Tensor, " n"]]
    desideratum: Int[Tensor, " n"]

    @staticmethod
    def of(pairs: Sequence[Desideratum], sites: Sequence[str]) -> "PairTable":
        """The table of all pairs.

        Raises:
            Invalid: pairs lack one of the sites, or have it outside a prompt.
        """
        for entry in pairs:
            for what in ("base", "source"):
                ids, at = getattr(entry, f"{what}_ids"), getattr(entry, f"{what}_positions")
                for name in sites:
                    check_name(name, at)
                check_positions({name: at[name] for name in sites}, len(ids), ids.shape[1], f"{what}_positions")
        earliest = torch.cat([torch.stack([entry.base_positions[name] for name in sites]).amin(0) for entry in pairs])
        order = earliest.argsort(stable=True)
        longest = max(entry.source_ids.shape[1] for entry in pairs)
        index = torch.cat([torch.full_like(entry.target, number) for number, entry in enumerate(pairs)])
        return PairTable(
            torch.cat([entry.base_ids for entry in pairs])[order],
            torch.cat([_lengthened(entry.source_ids, longest) for entry in pairs])[order],
            torch.cat([entry.target for entry in pairs])[order],
            {name: torch.cat([entry.base_positions[name] for entry in pairs])[order] for name in sites},
            {name: torch.cat([entry.source_positions[name] for entry in pairs])[order] for name in sites},
            index[order],
        )

    @torch.no_grad()
    def run(self, walker: Walker, rows: slice | Tensor, layers: int | None = None) -> PairRuns:
        """Run base and source prompts of some of the pairs, the source through so many layers only (None: all)."""
        source = walker.head_outputs(self.source_ids[rows], walker.n_layers if layers is None else layers)
        return PairRuns(
            walker.run(self.base_ids[rows]),
            {name: position[rows] for name, position in self.base_positions.items()},
            {
                name: outputs_at(source, position[rows, None])[:, :, 0]
                for name, position in self.source_positions.items()
            },
            self.target[rows],
            self.desideratum[rows],
        )


def _lengthened(ids: Int[Tensor, "n t"], length: int) -> Int[Tensor, "n length"]:
    """Prompts with more tokens behind them, which no earlier position can see: only outputs before are used."""
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]))


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
) -> dict[str, dict[str, Carried]]:
    """What each group carries, for each desideratum: group name -> desideratum -> result.

    Args:
        walker: the model; its parameters get no gradient.
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
    names = list(train)
    orders = mask_orders(walker, [train[name] for name in names], groups, settings, advance, processes)
    nested = [
        [_nested(group, order[d]) for group, order in zip(groups, orders, strict=True)] for d in range(len(names))
    ]
    pairs = [selection[name] for name in names]
    found = swap_accuracies(walker, pairs, groups, nested, settings.memory_mib, None, processes)
    advance("heads selected")
    chosen = [
        [
            sets[select_heads([accuracy[frozenset(heads)] for heads in sets], settings.tolerance)]
            for sets, accuracy in zip(*each, strict=True)
        ]
        for each in zip(nested, found, strict=True)
    ]
    final = [[[heads, group.heads] for heads, group in zip(each, groups, strict=True)] for each in chosen]
    pairs = [test[name] for name in names]
    found = swap_accuracies(walker, pairs, groups, final, settings.memory_mib, generator, processes)
    advance("accuracies")
    return {
        group.name: {
            name: Carried(
                selected=chosen[d][g],
                order=nested[d][g][-1],
                size=len(group.heads),
                accuracy=found[d][g][frozenset(chosen[d][g])],
                floor=found[d][g][frozenset()],
                all_heads_accuracy=found[d][g][frozenset(group.heads)],
                random_accuracy=found[d][g]["random"],
                n_test=len(test[name].target),
            )
            for d, name in enumerate(names)
        }
        for g, group in enumerate(groups)
    }


def mask_orders(
    walker: Walker,
    pairs: Sequence[Desideratum],
    groups: Sequence[Group],
    settings: MaskSettings,
    advance: Callable[[str], None] = lambda what: None,
    processes: int = 1,
) -> list[Int[Tensor, "desiderata heads"]]:
    """For each group, the order of its heads by the masks that are trained on the pairs of each desideratum."""
    walker.model.requires_grad_(False)
    table = PairTable.of(pairs, sorted({group.position for group in groups}))
    stride = max(1, len(table.target) // (settings.batch * len(pairs)))  # so every batch has early and late sites
    batches = [
        table.run(walker, torch.arange(first, len(table.target), stride), _layers(groups))
        for first in range(min(stride, settings.steps))
    ]

    def train_group(group: Group) -> Int[Tensor, "desiderata heads"]:
        return nested_order(*train_masks(walker, batches, group, len(pairs), settings))

    orders = []
    for group, order in zip(groups, in_processes(train_group, groups, processes), strict=True):
        orders.append(order)
        advance(f"masks of {group.name}")
    return orders


def train_masks(
    walker: Walker, batches: Sequence[PairRuns], group: Group, n_desiderata: int, settings: MaskSettings
) -> tuple[Float[Tensor, "desiderata heads"], Float[Tensor, "desiderata heads"]]:
    """Masks w of one group after training, and their means over the steps (who went first, and stayed)."""
    layers, heads = _indices(group)
    prepared = []
    for batch in batches:
        fit = rows_that_fit(walker, *_tail_shape(batch, group.position), settings.memory_mib)
        parts = []
        for part in slices(len(batch.target), min(fit, TAIL_ROWS)):  # in order of their sites
            parts.append((*batch.at(group.position, part), batch.target[part], batch.desideratum[part]))
        counts = torch.bincount(batch.desideratum, minlength=n_desiderata)
        prepared.append((parts, counts.clamp(min=1).to(walker.dtype)))
    mask = torch.full((n_desiderata, len(heads)), settings.start, dtype=walker.dtype, requires_grad=True)
    mean = torch.zeros_like(mask)
    optimizer = torch.optim.Adam([mask], lr=settings.learning_rate)
    for step in range(settings.steps):
        parts, counts = prepared[step % len(prepared)]
        optimizer.zero_grad()
        for run, sites, source, target, desideratum in parts:
            share = torch.zeros(n_desiderata, walker.n_layers, walker.n_heads, dtype=walker.dtype)
            share = share.index_put((torch.arange(n_desiderata)[:, None], layers, heads), 1 - mask)
            weights = share[desideratum][:, None, :, None]
            logits = exchange(walker, run, sites, source, weights, set(layers.tolist()))[:, 0]
            if settings.objective == "log_probability":
                logits = logits.log_softmax(-1)
            gain = logits.gather(1, target[:, None])[:, 0]
            (-(gain / counts[desideratum]).sum()).backward()
        (settings.sparsity * (1 - mask).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
            mean += mask / settings.steps
    return mask.detach(), mean


def nested_order(
    mask: Float[Tensor, "desiderata heads"], mean: Float[Tensor, "desiderata heads"]
) -> Int[Tensor, "desiderata heads"]:
    """Heads in the order in which they join: by mask; by its mean where masks are clamped alike."""
    return torch.from_numpy(np.lexsort((mean.numpy(), mask.numpy()), axis=1))


def swap_accuracies(
    walker: Walker,
    desiderata: Sequence[Desideratum],
    groups: Sequence[Group],
    sets: Sequence[Sequence[Sequence[Heads]]],
    memory_mib: float,
    generator: np.random.Generator | None = None,
    processes: int = 1,
) -> list[list[Accuracies]]:
    """Shares of pairs answered with the target when heads at a group's position are swapped.

    Args:
        walker: the model.
        desiderata: the pairs of each.
        groups: give the positions.
        sets: sets of heads to swap, for each desideratum and group.
        memory_mib: how much memory a pass may take, roughly.
        generator: draws as many random heads as the group has, anew for each pair; None: no such control.
        processes: how many to spread the pairs over.

    Returns:
        for each desideratum and group, the accuracy of each of its sets, of the empty set (the floor), and of "random"
        heads.
    """
    shape = (walker.n_layers, walker.n_heads)
    layers = None if generator is not None else _layers(groups)  # random heads are of any layer
    tables: list[PairTable] = []
    distinct: list[list[list[frozenset[tuple[int, int]]]]] = []
    weights: list[list[Tensor]] = []
    for pairs, of_groups in zip(desiderata, sets, strict=True):
        table = PairTable.of([pairs], sorted({group.position for group in groups}))
        tables.append(table)
        distinct.append(
            [sorted({frozenset(heads) for heads in each} - {frozenset()}, key=sorted) for each in of_groups]
        )
        weights.append([])
        for group, each in zip(groups, distinct[-1], strict=True):
            nodes = [[Node(layer, head, group.position) for layer, head in heads] for heads in each]
            n = len(table.target)
            weight = node_weights(nodes, table.base_positions, [group.position], *shape).expand(n, -1, -1, -1, -1)
            if generator is not None:
                weight = torch.cat([weight, random_weights(n, [len(group.heads)], *shape, generator)], 1)
            weights[-1].append(weight)

    @torch.no_grad()
    def hits_of(part: tuple[int, slice]) -> Int[Tensor, " counts"]:
        """Hits with nothing swapped, then those of every set of every group."""
        d, rows = part
        runs = tables[d].run(walker, rows, layers)
        hits = [(runs.base.logits.argmax(-1) == runs.target).sum()[None]]
        for group, weight in zip(groups, weights[d], strict=True):
            if weight.shape[1]:
                at = runs.at(group.position, slice(None))
                logits = exchange_in_parts(walker, *at, weight[rows], memory_mib)
                hits.append((logits.argmax(-1) == runs.target[:, None]).sum(0))
        return torch.cat(hits)

    parts = []
    for d, table in enumerate(tables):
        n, length = table.base_ids.shape
        parts += [(d, rows) for rows in slices(n, rows_that_fit(walker, length, length, memory_mib))]
    hits = [torch.zeros((), dtype=torch.long) for _ in tables]
    for (d, _), some in zip(parts, in_processes(hits_of, parts, processes), strict=True):
        hits[d] = hits[d] + some
    found: list[list[Accuracies]] = []
    for d, table in enumerate(tables):
        floor, *rest = [count / len(table.target) for count in hits[d].tolist()]
        found.append([])
        for each, weight in zip(distinct[d], weights[d], strict=True):
            keys = [frozenset(), *each, *(["random"] if generator is not None else [])]
            shares, rest = rest[: weight.shape[1]], rest[weight.shape[1] :]
            found[-1].append(dict(zip(keys, [floor, *shares], strict=True)))
    return found


def select_heads(accuracies: Sequence[float], tolerance: float) -> int:
    """How many heads to select: the fewest whose accuracy is within the tolerance of the best.

    Args:
        accuracies: of the nested sets of 0, 1, 2, ... heads.
        tolerance: 0 leaves only ties, which go to fewer heads.
    """
    enough = max(accuracies) - tolerance - 1e-12
    return next(count for count, accuracy in enumerate(accuracies) if accuracy >= enough)


def _nested(group: Group, order: Int[Tensor, " heads"]) -> list[Heads]:
    """No heads, the first, the first two, ..., all heads of an order."""
    ordered = [group.heads[index] for index in order.tolist()]
    return [tuple(ordered[:count]) for count in range(len(ordered) + 1)]


def _indices(group: Group) -> tuple[Int[Tensor, " heads"], Int[Tensor, " heads"]]:
    pairs = torch.tensor(group.heads)
    return pairs[:, 0], pairs[:, 1]


def _layers(groups: Sequence[Group]) -> int:
    """How many layers there are up to the highest one with a head of a group."""
    return 1 + max(layer for group in groups for layer, _ in group.heads)


def _tail_shape(pairs: PairRuns, position: str) -> tuple[int, int]:
    """Window slots of the pairs' tail, and length of the prompts."""
    length = pairs.base.keys.shape[-2]
    return length - int(pairs.positions[position].min()), length
