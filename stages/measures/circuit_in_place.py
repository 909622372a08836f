"""What a circuit does alone, in one call: beside the whole model, nothing at all, and random circuits of its shape.

Everything outside the circuit gives its mean: at the circuit's positions the heads that it does not have, at all other
positions every head. Means are by absolute position, so prompts are grouped by length, and a group's means are taken
over reference prompts of its length. By default these are the corrupt prompts, which look like the clean ones but for
what the answer hangs on, so that no mean knows the answer. Instead of its mean, a head outside may give its output in
the corrupt partner of each prompt, and means or outputs may be those of another model (`by_ablation`).

Of a real vocabulary the accuracy says little here: what makes the next word a name at all is ablated, too, and the
likeliest word is another one long before the circuit stops telling the answer from the other candidates. So there are
four `scores`, and none of them alone.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from stages.circuits.ablation import mean_outputs
from stages.circuits.checks import check_heads, check_name
from stages.circuits.circuit import Circuit, Node
from stages.circuits.exchange import random_nodes
from stages.circuits.pairs import Pairs, rectangle
from stages.circuits.walker import Walker
from stages.measures.by_ablation import Ablation, Resampled
from stages.measures.faithfulness import evaluate_groups
from stages.measures.prompts import AnsweredPrompts, Prompts
from stages.measures.readout import Readout
from stages.measures.scores import ABLATIONS, ratio
from stages.pipeline.stage import Invalid

REFERENCES = ("corrupt", "clean")


@dataclass(frozen=True)
class Scores:
    """Means over prompts.

    Attributes:
        logit_difference: logit of the answer minus the mean logit of the other candidates.
        accuracy: share of the prompts whose likeliest token of the whole vocabulary is the answer.
        candidate_accuracy: share of those in which the answer is the likeliest candidate.
        p_correct: probability of the answer.
    """

    logit_difference: float
    accuracy: float
    candidate_accuracy: float
    p_correct: float

    @staticmethod
    def of(readout: Readout) -> "list[Scores]":
        """Of every variant."""
        return [Scores(**means) for means in readout.means()]


@dataclass(frozen=True)
class InPlace:
    """A circuit in place, everything else ablated.

    Attributes:
        nodes: size of the circuit.
        groups: number of tokens -> how many prompts have it.
        reference: the prompts that means are over: the "corrupt" or the "clean" ones, of the same length.
        ablation: what everything else gives, one of `scores.ABLATIONS`.
        model: the whole model.
        circuit: the circuit alone.
        nothing: every head ablated everywhere.
        random: circuits with as many heads at each position, drawn without replacement.
    """

    nodes: int
    groups: dict[int, int]
    reference: str
    ablation: str
    model: Scores
    circuit: Scores
    nothing: Scores
    random: tuple[Scores, ...]

    @property
    def faithfulness(self) -> float | None:
        """The circuit's share of the model's logit difference; None where the model has none."""
        return ratio(self.circuit.logit_difference, self.model.logit_difference)

    @property
    def floor(self) -> float | None:
        """The largest such share of a random circuit."""
        shares = [ratio(scores.logit_difference, self.model.logit_difference) for scores in self.random]
        known = [share for share in shares if share is not None]
        return max(known, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the two shares among them."""
        values = asdict(self) | {"faithfulness": self.faithfulness, "floor": self.floor}
        values["groups"] = {str(length): count for length, count in self.groups.items()}
        return values | {"random": [asdict(scores) for scores in self.random]}

    def __str__(self) -> str:
        lengths = ", ".join(f"{count} of {length} tokens" for length, count in self.groups.items())
        share = "" if self.faithfulness is None else f": {self.faithfulness:.3f} of the logit difference"
        rows = [("whole model", self.model), (f"circuit, {self.nodes} nodes", self.circuit), ("nothing", self.nothing)]
        if self.random:
            columns = [[getattr(scores, field.name) for scores in self.random] for field in fields(Scores)]
            rows.append((f"{len(self.random)} random circuits", Scores(*(sum(c) / len(c) for c in columns))))
            share += "" if self.floor is None else f" (random circuits {self.floor:.3f} at most)"
        lines = [
            f"Circuit in place{share}",
            f"{self.ablation.replace('_', ' ')} of the {self.reference} prompts of the same length; prompts: {lengths}",
            f"{'':22}{'logit difference':>17}{'accuracy':>10}{'of candidates':>15}{'p(answer)':>11}",
        ]
        for name, scores in rows:
            numbers = f"{scores.logit_difference:17.3f}{scores.accuracy:10.3f}{scores.candidate_accuracy:15.3f}"
            lines.append(f"{name:22}{numbers}{scores.p_correct:11.4f}")
        return "\n".join(lines)


def faithfulness(
    model: Walker | nn.Module,
    circuit: Circuit | Collection[Node],
    pairs: Pairs,
    random_circuits: int = 20,
    reference: str = "corrupt",
    seed: int = 0,
    memory_mib: float | int = 1024,
    processes: int = 1,
    ablation: str = "own_means",
    base: Walker | nn.Module | None = None,
) -> InPlace:
    """How much of the model a circuit is: in place alone, beside the whole model, nothing, and random circuits.

    Args:
        model: a walker, or the Hugging Face model.
        circuit: found, imported, or any nodes.
        pairs: of any lengths, answers and others of one token.
        random_circuits: how many circuits are drawn that have as many heads at each position (the floor).
        reference: the prompts that heads outside the circuit give their mean over: "corrupt" or "clean".
        seed: of the random circuits.
        memory_mib: how much memory each process may take beside the model.
        processes: how many to spread the prompts over.
        ablation: what heads outside the circuit give: "own_means", "base_means", "resampled" (their outputs in the
            corrupt partner) or "base_resampled"; see `by_ablation`.
        base: the model whose heads give it, where it is the base's: with the same heads.

    Raises:
        Invalid: the circuit has no node or one that the model or the prompts do not have, the reference is another or
            its prompts have other lengths, an answer is several tokens, or ablation, base and reference do not go
            together.
    """
    if reference not in REFERENCES:
        raise Invalid(f"reference = '{reference}': must be one of {', '.join(REFERENCES)}")
    walker, of_base = _walker(model), None if base is None else _walker(base)
    nodes = frozenset(circuit.nodes if isinstance(circuit, Circuit) else circuit)
    check_heads([(node.layer, node.head) for node in nodes], walker.n_layers, walker.n_heads, "the circuit has head")
    for node in nodes:
        check_name(node.position, pairs.spans)
    groups = _by_length(pairs, reference)
    return in_place(
        walker, groups, nodes, reference, random_circuits, seed, float(memory_mib), processes, ablation, of_base
    )


def _walker(model: Walker | nn.Module) -> Walker:
    return model if isinstance(model, Walker) else Walker(model)


def _by_length(pairs: Pairs, reference: str) -> list[tuple[AnsweredPrompts, Int[Tensor, "m _"]]]:
    """Prompts of one length each, shorter ones first, with the reference prompts of their rows."""
    for row, (answer, others) in enumerate(zip(pairs.answer, pairs.others, strict=True)):
        if any(len(tokens) != 1 for tokens in (answer, *others)):
            raise Invalid(
                f"example {row} has an answer or another candidate of several tokens: must be one token each, of which "
                "a circuit in place gives the logits"
            )
    groups = []
    for length in sorted(set(map(len, pairs.clean))):
        rows = [row for row, ids in enumerate(pairs.clean) if len(ids) == length]
        partners = {len(pairs.corrupt[row]) for row in rows}
        if reference == "corrupt" and partners != {length}:
            raise Invalid(
                f"reference = 'corrupt': prompts of {length} tokens have corrupt partners of {sorted(partners)}: means "
                "are by position, so lengths must be equal; take 'clean'"
            )
        most = max(len(pairs.others[row]) for row in rows)
        others = [[other[0] for other in pairs.others[row]] for row in rows]
        prompts = AnsweredPrompts(
            torch.tensor([pairs.clean[row] for row in rows]),
            torch.tensor([pairs.answer[row][0] for row in rows]),
            torch.tensor([entry + [-1] * (most - len(entry)) for entry in others]),
            {name: rectangle([spans[row] for row in rows]) for name, spans in pairs.spans.items()},
        )
        ids = torch.tensor([(pairs.corrupt if reference == "corrupt" else pairs.clean)[row] for row in rows])
        groups.append((prompts, ids))
    return groups


def in_place(
    walker: Walker,
    groups: Sequence[tuple[Prompts, Int[Tensor, "m _"]]],
    nodes: Collection[Node],
    reference: str,
    random_circuits: int = 20,
    seed: int = 0,
    memory_mib: float = 1024.0,
    processes: int = 1,
    ablation: str = "own_means",
    base: Walker | None = None,
) -> InPlace:
    """`faithfulness` for groups of prompts of one length each, with the reference prompts of each group: one for each
    prompt where heads are resampled.

    Raises:
        Invalid: the circuit has no node, the reference prompts of a group have another length, or ablation, base and
            reference do not go together.
    """
    resampled = ablation.endswith("resampled")
    if ablation not in ABLATIONS:
        raise Invalid(f"ablation = '{ablation}': must be one of {', '.join(ABLATIONS)}")
    if ablation.startswith("base_") and base is None:
        raise Invalid(f"ablation = '{ablation}': base must be the model whose heads give it, not None")
    if base is not None and not ablation.startswith("base_"):
        raise Invalid(f"ablation = '{ablation}': base must be None, as its heads give nothing")
    if resampled and reference != "corrupt":
        raise Invalid(
            f"reference = '{reference}': must be 'corrupt' with ablation = '{ablation}', which takes outputs in "
            "each prompt's partner"
        )
    if not nodes:
        raise Invalid("the circuit has no node: must have at least one")
    if random_circuits < 0:
        raise Invalid(f"random_circuits = {random_circuits}: must be 0 or more")
    donor = walker if base is None else base
    with_ablations: list[tuple[Prompts, Ablation]] = []
    for prompts, ids in groups:
        if ids.shape[1] != prompts.input_ids.shape[1]:
            wanted = prompts.input_ids.shape[1]
            raise Invalid(
                f"reference = '{reference}': prompts of {ids.shape[1]} tokens beside prompts of {wanted}: means are by "
                "position, so lengths must be equal"
            )
        outside = Resampled(donor, ids) if resampled else mean_outputs(donor, ids, memory_mib, processes)
        with_ablations.append((prompts, outside))
    generator = np.random.default_rng(seed)
    random = [random_nodes(nodes, walker.n_layers, walker.n_heads, generator) for _ in range(random_circuits)]
    found = evaluate_groups(walker, with_ablations, [nodes, (), *random], [], memory_mib, processes=processes)
    circuit, nothing, *floor = Scores.of(found.in_place)
    lengths: dict[int, int] = {}
    for prompts, _ in groups:
        length = prompts.input_ids.shape[1]
        lengths[length] = lengths.get(length, 0) + len(prompts)
    model = Scores.of(found.full)[0]
    return InPlace(len(set(nodes)), lengths, reference, ablation, model, circuit, nothing, tuple(floor))
