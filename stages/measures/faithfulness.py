"""How well circuits work in a model, and how the model does without parts of them.

F is one of the four `scores`, a mean over examples. Faithfulness of a circuit C in a model M is F(C|M) / F(M), with
everything outside C mean-ablated (Prakash et al., ICLR 2024, section 4).

A node is kept, or removed, at every index that the prompts have for its position. So whoever asks decides what a head
at a token of a clause means: at that token of every clause (a head that stands before the query cannot know which
clause will be asked for, and does there what it does in all of them; and where it is kept in one alone, all others
carry the same mean, which some models read as a match of its own kind), or in the queried clause alone, as the paper.

Means are by absolute position, so prompts of several lengths are groups of equal length with means of their own.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.ablation import ablated_run, circuits_in_place, nodes_removed
from stages.circuits.budget import MIB, making_bytes, pass_bytes, rows_that_fit, run_bytes
from stages.circuits.circuit import Node
from stages.circuits.exchange import slices
from stages.circuits.walker import KEPT, Walker
from stages.measures.by_ablation import Ablation, check_ablation, donor_bytes, outputs_of
from stages.measures.prompts import Prompts
from stages.measures.readout import Readout, reading
from stages.measures.scores import shares
from stages.pipeline.processes import in_processes
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class Evaluation:
    """Readouts of one model on the same examples.

    Attributes:
        full: the whole model, one variant.
        in_place: each circuit, everything else mean-ablated.
        without: the model without each set of nodes.
    """

    full: Readout
    in_place: Readout
    without: Readout


def outcomes(correct: Bool[Tensor, " n"], order: Int[Tensor, " n"]) -> str:
    """One character an example, 1 where the answer is right, as the examples were before they were put in `order`."""
    before = torch.empty_like(correct)
    before[order] = correct
    return "".join("1" if right else "0" for right in before.tolist())


def evaluate_circuits(
    walker: Walker,
    means: Float[Tensor, "layers t h a"],
    prompts: Prompts,
    circuits: Sequence[Collection[Node]],
    removed: Sequence[Collection[Node]],
    memory_mib: float,
    advance: Callable[[int], object] = lambda n: None,
    processes: int = 1,
) -> Evaluation:
    """Run a model whole, with each circuit in place, and without each set of nodes.

    Args:
        walker: the model.
        means: its mean head outputs.
        prompts: with answers; `prompts.in_tail_order` makes the removals cheaper.
        circuits: nodes that stay, everything else being mean-ablated.
        removed: nodes that are mean-ablated, everything else being live.
        memory_mib: how much memory each process may take beside the model.
        advance: called with the number of examples done.
        processes: how many to spread the examples over.
    """
    return evaluate_groups(walker, [(prompts, means)], circuits, removed, memory_mib, advance, processes)


def evaluate_groups(
    walker: Walker,
    groups: Sequence[tuple[Prompts, Ablation]],
    circuits: Sequence[Collection[Node]],
    removed: Sequence[Collection[Node]],
    memory_mib: float,
    advance: Callable[[int], object] = lambda n: None,
    processes: int = 1,
) -> Evaluation:
    """`evaluate_circuits` for groups of prompts of one length each, with the mean head outputs over prompts of that
    length, or resampled ones, which nothing can be removed to; the readouts are of all examples, group after group."""
    if not groups or not all(len(prompts) for prompts, _ in groups):
        raise Invalid("groups of prompts: must be at least one, and none without prompts")
    for prompts, ablation in groups:
        check_ablation(walker, prompts, ablation)

    @torch.no_grad()
    def readings(part: tuple[int, slice]) -> tuple[Float[Tensor, "n e 4"], ...]:
        prompts, ablation = groups[part[0]]
        some, means = prompts.select(part[1]), outputs_of(ablation, part[1])
        n, length = some.input_ids.shape
        read, ids = reading(some.answer, some.others), some.input_ids.to(walker.device)
        own = run_bytes(walker, length) + donor_bytes(walker, length, ablation)
        left = memory_mib - n * own / MIB  # for passes, with one run at a time
        clean = walker.run(ids, keep=KEPT if removed else ())
        full = read(clean.logits[:, None], slice(0, n))
        without = [nodes_removed(walker, clean, means, some.positions, nodes, left, read) for nodes in removed]
        del clean
        background = ablated_run(walker, ids, means)
        in_place = circuits_in_place(walker, background, means, some.positions, circuits, left, read)
        return full, in_place, torch.stack(without, 1) if without else full[:, :0]

    parts = []
    for number, (prompts, ablation) in enumerate(groups):
        at_once = runs_that_fit(walker, prompts, memory_mib, donor_bytes(walker, prompts.input_ids.shape[1], ablation))
        parts += [(number, rows) for rows in slices(len(prompts), at_once)]
    found = []
    for read in in_processes(readings, parts, processes):
        found.append(read)
        advance(len(read[0]))
    return Evaluation(*(Readout.join(readings) for readings in zip(*found, strict=True)))


def runs_that_fit(walker: Walker, prompts: Prompts, memory_mib: float, beside: int = 0) -> int:
    """On how many of the prompts a model can run at once, the run being kept, and so many bytes beside each."""
    length = prompts.input_ids.shape[1]
    each = making_bytes(walker, length) + beside
    return rows_that_fit(walker, each, memory_mib * MIB, pass_bytes(walker, length, length))


def circuit_record(size: int, kept: Mapping[str, float], full: Mapping[str, float]) -> dict[str, float | int | None]:
    """A circuit's scores in a model, and as shares of the model's own.

    Args:
        size: number of nodes.
        kept: means of the circuit in place, as in `Readout.means`.
        full: means of the whole model.
    """
    return {"size": size, **kept, **shares("faithfulness", kept, full)}
