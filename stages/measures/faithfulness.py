"""How well circuits work in a model, and how the model does without parts of them.

F is a score over examples: the accuracy (argmax over the whole vocabulary is the answer) or the mean logit
difference (answer minus mean of the other objects of the context). Faithfulness of a circuit C in a model M
is F(C|M) / F(M), with everything outside C mean-ablated (Prakash et al., ICLR 2024, section 4).

A node at a token of a clause is kept, or removed, at that token of every clause. Prakash et al. keep it in the queried
clause alone. But a head that stands before the query cannot know which clause will be asked for, so it does there what
it does in all clauses; and where it is kept in one alone, all others carry the same mean, which some models read as a
match of its own kind. The paper's way is `Clauses.QUERIED`, and is measured beside ours.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.ablation import ablated_run, circuits_in_place, nodes_removed
from stages.circuits.circuit import Node
from stages.circuits.exchange import by_earliest, rows_that_fit, slices
from stages.circuits.scores import logit_difference
from stages.circuits.walker import Walker
from stages.pipeline.processes import in_processes
from stages.tasks.examples import Clauses, Examples


@dataclass(frozen=True)
class Readout:
    """What is read from the logits of n examples in e variants.

    Attributes:
        correct: whether the most likely token of the whole vocabulary is the answer.
        logit_difference: logit of the answer minus the mean logit of the other objects.
        p_correct: probability of the answer.
    """

    correct: Bool[Tensor, "n e"]
    logit_difference: Float[Tensor, "n e"]
    p_correct: Float[Tensor, "n e"]

    @staticmethod
    def of(logits: Float[Tensor, "n e vocab"], answer: Int[Tensor, " n"], others: Int[Tensor, "n k"]) -> "Readout":
        """Read the logits out, in float64."""
        logits = logits.double()
        right = logits.gather(-1, answer[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
        return Readout(
            logits.argmax(-1) == answer[:, None],
            logit_difference(logits, answer, others),
            (right - logits.logsumexp(-1)).exp(),
        )

    @staticmethod
    def join(parts: Sequence["Readout"]) -> "Readout":
        """One readout of the examples of several."""
        return Readout(
            torch.cat([part.correct for part in parts]),
            torch.cat([part.logit_difference for part in parts]),
            torch.cat([part.p_correct for part in parts]),
        )

    def means(self) -> list[dict[str, float]]:
        """Accuracy, logit difference and probability of the answer of each variant."""
        accuracy = self.correct.double().mean(0).tolist()
        difference, p = self.logit_difference.mean(0).tolist(), self.p_correct.mean(0).tolist()
        return [
            {"accuracy": a, "logit_difference": d, "p_correct": q}
            for a, d, q in zip(accuracy, difference, p, strict=True)
        ]


@dataclass(frozen=True)
class Evaluation:
    """Readouts of one model on the same examples.

    Attributes:
        full: the whole model, one variant.
        in_place: each circuit, everything else mean-ablated.
        without: the model without each set of nodes.
        in_queried_clause: each circuit that was asked for so, kept in no other clause.
    """

    full: Readout
    in_place: Readout
    without: Readout
    in_queried_clause: Readout


def tail_order(examples: Examples, names: Collection[str]) -> Int[Tensor, " n"]:
    """Indices of the examples in an order in which passes from the earliest named position on are shortest, as far as
    it is the queried clause's."""
    if not names:
        return torch.arange(len(examples))
    return by_earliest(torch.stack([examples.positions[name] for name in sorted(names)], 1))


def in_tail_order(examples: Examples, names: Collection[str]) -> Examples:
    """The examples in `tail_order`."""
    return examples.select(tail_order(examples, names))


def outcomes(correct: Bool[Tensor, " n"], order: Int[Tensor, " n"]) -> str:
    """One character an example, 1 where the answer is right, as the examples were before they were put in `order`."""
    before = torch.empty_like(correct)
    before[order] = correct
    return "".join("1" if right else "0" for right in before.tolist())


def evaluate_circuits(
    walker: Walker,
    means: Float[Tensor, "layers t h a"],
    examples: Examples,
    circuits: Sequence[Collection[Node]],
    removed: Sequence[Collection[Node]],
    memory_mib: float,
    clauses: Clauses | str = Clauses.EVERY,
    advance: Callable[[int], object] = lambda n: None,
    processes: int = 1,
    queried: Sequence[Collection[Node]] = (),
) -> Evaluation:
    """Run a model whole, with each circuit in place, and without each set of nodes.

    Args:
        walker: the model.
        means: its mean head outputs.
        examples: prompts with answers; `in_tail_order` makes the removals cheaper.
        circuits: nodes that stay, everything else being mean-ablated.
        removed: nodes that are mean-ablated, everything else being live.
        memory_mib: how much memory a pass may take, roughly.
        clauses: where nodes at a token of a clause are kept or removed.
        advance: called with the number of examples done.
        processes: how many to spread the examples over.
        queried: nodes that stay in the queried clause alone, whatever `clauses` says.
    """
    length = examples.input_ids.shape[1]

    @torch.no_grad()
    def readouts(rows: slice) -> tuple[Readout, ...]:
        part = examples.select(rows)
        places = part.places(clauses)
        clean = walker.run(part.input_ids)
        background = ablated_run(walker, part.input_ids, means)
        kept = circuits_in_place(walker, background, means, places, circuits, memory_mib)
        lost = [nodes_removed(walker, clean, means, places, nodes, memory_mib) for nodes in removed]
        lost = torch.stack(lost, 1) if lost else clean.logits[:, None][:, :0]
        in_queried_clause = circuits_in_place(walker, background, means, part.positions, queried, memory_mib)
        runs = (clean.logits[:, None], kept, lost, in_queried_clause)
        return tuple(Readout.of(logits, part.answer, part.others) for logits in runs)

    found = []
    for readout in in_processes(
        readouts, slices(len(examples), rows_that_fit(walker, length, length, memory_mib)), processes
    ):
        found.append(readout)
        advance(len(readout[0].correct))
    return Evaluation(*(Readout.join(parts) for parts in zip(*found, strict=True)))


def ratio(numerator: float, denominator: float) -> float | None:
    """Their quotient, or None where the denominator is not positive and a share of it means nothing."""
    return numerator / denominator if denominator > 0 else None


def circuit_record(size: int, kept: Mapping[str, float], full: Mapping[str, float]) -> dict[str, float | int | None]:
    """A circuit's scores in a model, and as shares of the model's own.

    Args:
        size: number of nodes.
        kept: means of the circuit in place, as in `Readout.means`.
        full: means of the whole model.
    """
    return {
        "size": size,
        "accuracy": kept["accuracy"],
        "logit_difference": kept["logit_difference"],
        "faithfulness": ratio(kept["accuracy"], full["accuracy"]),
        "faithfulness_ld": ratio(kept["logit_difference"], full["logit_difference"]),
    }
