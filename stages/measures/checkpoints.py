"""What the base's circuit still does in the checkpoints of a run: one number of each kind, for many checkpoints.

Stage `evaluate` takes one checkpoint of a run apart; this asks the one question of all others that a matching picked,
in the same way: the circuit in place, everything else mean-ablated with the checkpoint's own means.
"""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Node
from stages.circuits.walker import Walker
from stages.learning.probes import score_answers
from stages.measures.faithfulness import circuit_record, evaluate_circuits
from stages.measures.prompts import Prompts
from stages.tasks.examples import Prompts as NewPrompts


def scores(
    model: PreTrainedModel,
    nodes: Collection[Node],
    reference: Int[Tensor, "n t"],
    old: Prompts,
    new: NewPrompts,
    memory_mib: float,
) -> dict[str, Any]:
    """Means over the prompts: of the whole model (`full`), with the circuit in place (`kept`), and `new_accuracy`.

    Args:
        model: a checkpoint, or the base.
        nodes: the base's circuit; without one, `kept` is the model with every head ablated.
        reference: prompts that the mean head outputs are taken over.
        old: evaluation prompts of the old task, at the positions where nodes are kept.
        new: evaluation prompts of the new task.
        memory_mib: how much memory may be taken beside the model.
    """
    walker = Walker(model)
    means = mean_outputs(walker, reference, memory_mib)
    found = evaluate_circuits(walker, means, old, [nodes], [], memory_mib)
    right = score_answers(model, new).right
    return {
        "full": found.full.means()[0],
        "kept": found.in_place.means()[0],
        "new_accuracy": right.double().mean().item(),
    }


def record(size: int, scored: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of one checkpoint: as in stage `evaluate`, `circuit` is None where the base has none.

    Args:
        size: number of nodes of the base's circuit.
        scored: `scores` of the checkpoint.
    """
    full = scored["full"]
    return {
        **{f"old_{score}": value for score, value in full.items()},
        "new_accuracy": scored["new_accuracy"],
        "circuit": circuit_record(size, scored["kept"], full) if size else None,
    }
