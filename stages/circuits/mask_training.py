"""Training of the masks of DCM: one number for each head of a group and each desideratum (see `masks`).

Only positions from the earliest site on and layers from the group's lowest on are computed; the rest comes from the
clean base run, and gradients run through that tail only. All desiderata of a group are trained in one batch.

Of the runs, a tail needs the keys and values before it, one layer of the stream, and the source's outputs at the site.
That is kept for all pairs as far as it fits one half of the memory, and made again for every step where it does not;
the other half is for passes, and for runs that are made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stages.circuits.budget import MIB, gradient_bytes, making_bytes, outputs_bytes, pass_bytes, rows_that_fit
from stages.circuits.circuit import Group
from stages.circuits.desiderata_pairs import Desideratum, PairTable
from stages.circuits.exchange import Sites, Start, swap
from stages.circuits.walker import Prefix, Run, Walker
from stages.pipeline.processes import in_processes

# Rows of a pass while masks are trained: fewer waste time between the operations, more make tails longer than needed.
TAIL_ROWS = 16

RankedHeads = tuple[tuple[int, int], ...]  # (layer, head) pairs, the strongest first


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
        memory_mib: how much memory each process may take beside the model.
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
class Tail:
    """What a pass over some pairs needs for one group.

    Attributes:
        start: of the clean base run, at the group's lowest layer.
        sites: the group's position.
        source: the source's outputs there, in the layers of the group.
        target: token that the desideratum of each pair asks for.
        desideratum: its number.
    """

    start: Start
    sites: Sites
    source: Mapping[int, Float[Tensor, "n 1 h a"]]
    target: Int[Tensor, " n"]
    desideratum: Int[Tensor, " n"]

    def bytes(self) -> int:
        """What it holds, without the keys and values before it."""
        own = [self.start.entering, self.start.z, self.start.leaving, *self.source.values(), self.sites.holds]
        return sum(x.nbytes for x in own if x is not None)


class Tails:
    """Tails of batches of pairs for each of some groups, kept as far as memory allows.

    Args:
        walker: the model.
        table: the pairs.
        groups: whose heads are masked.
        batches: which pairs are in each batch; in the order of their sites.
        memory_mib: one half is for what is kept.
    """

    def __init__(
        self,
        walker: Walker,
        table: PairTable,
        groups: Sequence[Group],
        batches: Sequence[Int[Tensor, " _"]],
        memory_mib: float,
    ) -> None:
        self.walker, self.table = walker, table
        half, length = memory_mib * MIB / 2, table.base_ids.shape[1]
        making = making_bytes(walker, length) + outputs_bytes(walker, table.source_ids.shape[1])
        fit = rows_that_fit(walker, making, half, pass_bytes(walker, length, length))
        for group in groups:
            slots = length - int(table.base_positions[group.position].min())
            each = gradient_bytes(walker, slots, length, walker.n_layers - min(_layers(group)))
            fit = min(fit, rows_that_fit(walker, each, half, pass_bytes(walker, slots, length)))
        self.parts = [batch.split(min(fit, TAIL_ROWS)) for batch in batches]
        self._kept: dict[tuple[Group, int, int], Tail] = {}
        held = 0
        for batch, parts in enumerate(self.parts):
            for part, rows in enumerate(parts):
                tails = self._make(groups, rows)
                prefixes = {id(tail.start.background): tail.start.background for tail in tails}
                held += sum(prefix.keys.nbytes + prefix.values.nbytes for prefix in prefixes.values())
                held += sum(tail.bytes() for tail in tails)
                if held > half:
                    return
                self._kept |= {(group, batch, part): tail for group, tail in zip(groups, tails, strict=True)}

    def of(self, group: Group, batch: int) -> Iterator[Tail]:
        """The tails of one batch, part by part."""
        for part, rows in enumerate(self.parts[batch]):
            kept = self._kept.get((group, batch, part))
            yield self._make([group], rows)[0] if kept is None else kept

    @torch.no_grad()
    def _make(self, groups: Sequence[Group], rows: Int[Tensor, " _"]) -> list[Tail]:
        walker, table = self.walker, self.table
        highest = max(max(_layers(group)) for group in groups)
        sources = table.source_outputs(walker, rows, highest + 1)
        run = table.base_run(walker, rows)
        sites: dict[str, Sites] = {}
        prefixes: dict[str, Prefix | Run] = {}
        tails = []
        for group in groups:
            name = group.position
            if name not in sites:
                at = table.base_positions[name][rows, None].to(walker.device)
                sites[name] = Sites.tail(at, table.base_ids.shape[1], walker.dtype)
                prefixes[name] = Start.of(run, sites[name], 0).compact(sites[name]).background
            start = replace(Start.of(run, sites[name], min(_layers(group))), background=prefixes[name])
            source = {layer: sources[name][layer][:, None].clone() for layer in _layers(group)}
            target, desideratum = (x[rows].to(walker.device) for x in (table.target, table.desideratum))
            tails.append(Tail(start, sites[name], source, target, desideratum))
        return tails


def mask_orders(
    walker: Walker,
    pairs: Mapping[str, Desideratum],
    groups: Sequence[Group],
    settings: MaskSettings,
    advance: Callable[[str], None] = lambda what: None,
    processes: int = 1,
) -> dict[tuple[str, str], RankedHeads]:
    """(group, desideratum) -> the group's heads in the order of the masks that are trained on the pairs."""
    table = PairTable.of(list(pairs.values()), sorted({group.position for group in groups}))
    stride = max(1, len(table) // (settings.batch * len(pairs)))  # so every batch has early and late sites
    batches = [torch.arange(first, len(table), stride, device="cpu") for first in range(min(stride, settings.steps))]
    orders: dict[tuple[str, str], RankedHeads] = {}
    with without_gradients(walker.model):
        tails = Tails(walker, table, groups, batches, settings.memory_mib)

        def train(group: Group) -> Int[Tensor, "desiderata heads"]:
            return nested_order(*train_masks(tails, group, settings))

        for group, order in zip(groups, in_processes(train, groups, processes), strict=True):
            for name, indices in zip(pairs, order.tolist(), strict=True):
                orders[group.name, name] = tuple(group.heads[index] for index in indices)
            advance(f"masks of {group.name}")
    return orders


def train_masks(
    tails: Tails, group: Group, settings: MaskSettings
) -> tuple[Float[Tensor, "desiderata heads"], Float[Tensor, "desiderata heads"]]:
    """Masks w of one group after training, and their means over the steps (who went first, and stayed)."""
    walker, table = tails.walker, tails.table
    layers, heads = (torch.tensor(column, device=walker.device) for column in zip(*group.heads, strict=True))
    shape = (table.count, len(group.heads))
    # as exact as logits, also where the model is not: a step of Adam is less than bfloat16 can add to 1
    exact = walker.logits_dtype
    mask = torch.full(shape, settings.start, dtype=exact, device=walker.device, requires_grad=True)
    desiderata = torch.arange(table.count, device=walker.device)[:, None]
    mean = torch.zeros_like(mask)
    optimizer = torch.optim.Adam([mask], lr=settings.learning_rate)
    for step in range(settings.steps):
        batch = step % len(tails.parts)
        counts = torch.bincount(table.desideratum[torch.cat(tails.parts[batch])], minlength=table.count)
        counts = counts.clamp(min=1).to(walker.device, exact)
        optimizer.zero_grad()
        for tail in tails.of(group, batch):
            share = torch.zeros(table.count, walker.n_layers, walker.n_heads, dtype=exact, device=walker.device)
            share = share.index_put((desiderata, layers, heads), 1 - mask)
            weights = share[tail.desideratum][:, None, :, None].to(walker.dtype)
            logits = swap(walker, tail.start, tail.sites, tail.source.__getitem__, weights, set(tail.source))[:, 0]
            if settings.objective == "log_probability":
                logits = logits.log_softmax(-1)
            gain = logits.gather(1, tail.target[:, None])[:, 0]
            (-(gain / counts[tail.desideratum]).sum()).backward()
        (settings.sparsity * (1 - mask).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
            mean += mask / settings.steps
    return mask.detach().cpu(), mean.cpu()


def nested_order(
    mask: Float[Tensor, "desiderata heads"], mean: Float[Tensor, "desiderata heads"]
) -> Int[Tensor, "desiderata heads"]:
    """Heads in the order in which they join: by mask; by its mean where masks are clamped alike."""
    return torch.from_numpy(np.lexsort((mean.numpy(), mask.numpy()), axis=1))


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters ask for no gradient inside, and afterwards as before."""
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(required)


def _layers(group: Group) -> list[int]:
    return sorted({layer for layer, _ in group.heads})
