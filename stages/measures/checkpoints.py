"""What the base's circuit still does in the checkpoints of a run: one number of each kind, for many checkpoints.

Stage `evaluate` takes one checkpoint of a run apart; this asks the one question of all others that a matching picked,
in the same way: the circuit in place, everything else mean-ablated with the checkpoint's own means, or giving other
outputs (`by_ablation`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Node
from stages.circuits.walker import Walker
from stages.learning.probes import score_answers
from stages.measures.by_ablation import Ablation, Resampled, circuit_with
from stages.measures.faithfulness import circuit_record, evaluate_circuits
from stages.measures.prompts import Prompts
from stages.tasks.examples import Prompts as NewPrompts


@dataclass(frozen=True)
class Around:
    """What heads outside the circuit give beside the checkpoint's own means.

    Attributes:
        base: the base, whose heads may give it.
        base_means: its mean head outputs.
        donors: prompts that heads are resampled from, one for each old-task prompt.
        kinds: of `ABLATIONS`.
    """

    base: Walker
    base_means: Float[Tensor, "layers t h a"]
    donors: Int[Tensor, "n t"]
    kinds: Sequence[str]

    def of(self, kind: str, walker: Walker) -> Ablation:
        if kind == "base_means":
            return self.base_means
        return Resampled(walker if kind == "resampled" else self.base, self.donors)


def scores(
    model: PreTrainedModel,
    nodes: Collection[Node],
    reference: Int[Tensor, "n t"],
    old: Prompts,
    new: NewPrompts,
    memory_mib: float,
    around: Around | None = None,
) -> dict[str, Any]:
    """Means over the prompts: of the whole model (`full`), with the circuit in place (`kept`, and by kind of ablation
    `others`), and of the new task.

    Args:
        model: a checkpoint, or the base.
        nodes: the base's circuit; without one, `kept` is the model with every head ablated.
        reference: prompts that the mean head outputs are taken over.
        old: evaluation prompts of the old task, at the positions where nodes are kept.
        new: evaluation prompts of the new task.
        memory_mib: how much memory may be taken beside the model.
        around: further ablations; only with nodes.
    """
    walker = Walker(model)
    means = mean_outputs(walker, reference, memory_mib)
    found = evaluate_circuits(walker, means, old, [nodes], [], memory_mib)
    said = score_answers(model, new)
    others = {}
    if around is not None and nodes:
        for kind in around.kinds:
            others[kind] = circuit_with(walker, old, nodes, around.of(kind, walker), memory_mib)[0].means()[0]
    return {
        "full": found.full.means()[0],
        "kept": found.in_place.means()[0],
        "others": others,
        "new_accuracy": said.right.double().mean().item(),
        "new_valid_mass": said.valid_mass.mean().item(),
    }


def record(size: int, scored: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of one checkpoint: as in stage `evaluate`, `circuit` is None where the base has none.

    Args:
        size: number of nodes of the base's circuit.
        scored: `scores` of the checkpoint.
    """
    full = scored["full"]
    own = circuit_record(size, scored["kept"], full) if size else None
    others = {kind: circuit_record(size, kept, full) for kind, kept in scored["others"].items()}
    return {
        **{f"old_{score}": value for score, value in full.items()},
        "new_accuracy": scored["new_accuracy"],
        "new_valid_mass": scored["new_valid_mass"],
        "circuit": own,
        "circuit_by_ablation": {"own_means": dict(own), **others} if own else None,
    }
