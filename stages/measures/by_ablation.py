"""The same circuit in place while the heads outside it give different things.

Four kinds, each at every head outside the circuit at its positions, and at every head everywhere else:

- `own_means`: the model's own mean output at that layer and position;
- `base_means`: the mean output of the base that the model was tuned from;
- `resampled`: the model's own output, at that layer and position, in another prompt: in the corrupt partner, which has
  the same words but for what the answer hangs on, so that a head gives what is usual there, of a wrong context;
- `base_resampled`: the output of the base in that partner.

A mean says nothing of any answer, so with means a circuit need only say more of its answer than nothing does. Resampled
heads say as much as ever, of another answer, so that the circuit has to be all that matters: what was left out of it
speaks against it (Chan et al., "Causal scrubbing", 2022). Where a tuned model keeps the circuit with the base's outputs
around it, and not with its own, what was lost lies around the circuit; what is lost with the base's outputs, too, is
lost in the circuit's heads and in what stays live beside them (MLPs, embeddings, norms).
`from_donor` says how much the other prompt answers: the share of prompts whose likeliest token stands in it, and not in
the prompt itself.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.ablation import BACKGROUND, ablated_run, circuits_in_place
from stages.circuits.budget import MIB, making_bytes, pass_bytes, rows_that_fit, run_bytes
from stages.circuits.circuit import Node
from stages.circuits.exchange import Reduce, slices
from stages.circuits.walker import Walker
from stages.measures.prompts import Prompts
from stages.measures.readout import Readout, reading
from stages.pipeline.processes import in_processes
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class Resampled:
    """Heads give what a donor's heads give in another prompt.

    Attributes:
        donor: a model with the same heads.
        input_ids: for each prompt the other one, of the same length.
    """

    donor: Walker
    input_ids: Int[Tensor, "n t"]


Ablation = Float[Tensor, "layers _ h a"] | Resampled  # means at every position, or other prompts


@torch.no_grad()
def circuit_with(
    walker: Walker,
    prompts: Prompts,
    nodes: Collection[Node],
    ablation: Ablation,
    memory_mib: float,
    processes: int = 1,
) -> tuple[Readout, Int[Tensor, " n"]]:
    """A circuit in place, the heads outside it giving what the ablation says; and the likeliest token of each prompt.

    Args:
        walker: the model.
        prompts: with answers, at the positions where nodes are kept.
        nodes: the circuit.
        ablation: what all other heads give.
        memory_mib: how much memory each process may take beside the models.
        processes: how many to spread the prompts over.

    Raises:
        Invalid: the other prompts are not as many, or not as long, or the donor has other heads.
    """
    length = prompts.input_ids.shape[1]
    check_ablation(walker, prompts, ablation)
    of_donor = donor_bytes(walker, length, ablation)

    def readings(rows: slice) -> Float[Tensor, "n 5"]:
        some, outputs = prompts.select(rows), outputs_of(ablation, rows)
        left = memory_mib - len(some) * (run_bytes(walker, length, BACKGROUND) + of_donor) / MIB
        background = ablated_run(walker, some.input_ids, outputs)
        read = _with_likeliest(reading(some.answer, some.others))
        return circuits_in_place(walker, background, outputs, some.positions, [nodes], left, read)[:, 0]

    each = making_bytes(walker, length, BACKGROUND) + of_donor
    at_once = rows_that_fit(walker, each, memory_mib * MIB, pass_bytes(walker, length, length))
    found = torch.cat(list(in_processes(readings, slices(len(prompts), at_once), processes)))
    return Readout.join([found[:, None, :4]]), found[:, 4].long()


def _with_likeliest(read: Reduce) -> Reduce:
    """The same numbers and the likeliest token."""

    def both(logits: Float[Tensor, "n e vocab"], rows: slice) -> Float[Tensor, "n e 5"]:
        return torch.cat([read(logits, rows), logits.argmax(-1)[..., None].double().cpu()], dim=-1)

    return both


def outputs_of(ablation: Ablation, rows: slice) -> Float[Tensor, "layers ... t h a"]:
    """What heads give in some of the prompts: the means, or each one's own."""
    if not isinstance(ablation, Resampled):
        return ablation
    return ablation.donor.run(ablation.input_ids[rows].to(ablation.donor.device), keep=("z",)).z


def donor_bytes(walker: Walker, length: int, ablation: Ablation) -> int:
    """What the other prompt of one prompt takes beside it."""
    return run_bytes(walker, length, ("z",)) if isinstance(ablation, Resampled) else 0


def check_ablation(walker: Walker, prompts: Prompts, ablation: Ablation) -> None:
    """
    Raises:
        Invalid: the other prompts are not as many, or not as long, or the donor has other heads.
    """
    if not isinstance(ablation, Resampled):
        return
    if ablation.input_ids.shape != prompts.input_ids.shape:
        of, wanted = (list(ids.shape) for ids in (ablation.input_ids, prompts.input_ids))
        raise Invalid(f"resampled from prompts of shape {of}: must be one for each prompt, as long as it, {wanted}")
    heads = [(of.n_layers, of.n_heads, of.head_dim) for of in (ablation.donor, walker)]
    if heads[0] != heads[1]:
        raise Invalid(
            f"the donor has {heads[0]} layers, heads and numbers a head: must be those of the model, {heads[1]}"
        )


def from_donor(
    likeliest: Int[Tensor, " n"], prompts: Int[Tensor, "n t"], donors: Int[Tensor, "n t"]
) -> Bool[Tensor, " n"]:
    """Whether a token stands in the other prompt and not in the prompt itself."""
    in_donor, in_prompt = ((ids == likeliest[:, None]).any(1) for ids in (donors, prompts))
    return in_donor & ~in_prompt
