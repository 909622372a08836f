"""Cross-model activation patching (CMAP): head outputs of one model at work in another.

Source: Prakash et al., ICLR 2024, section 6. Donor and receiver read the same prompts. At the nodes of a
group, or of a whole circuit, the donor's head outputs z replace the receiver's, which reads them through its
own o_proj; everything above is computed anew, everything else is the receiver's clean run. Where the receiver
becomes as good as the donor, the difference between the two lies in what these heads output.
"""

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.circuits.circuit import Node
from stages.circuits.exchange import (
    Positions,
    Sites,
    at_all_indices,
    exchange_in_parts,
    node_weights,
    outputs_at,
    random_weights,
    stack_positions,
)
from stages.circuits.walker import Run, Walker
from stages.pipeline.stage import Invalid


@torch.no_grad()
def transplant(
    receiver: Walker,
    clean: Run,
    donor: Run,
    positions: Positions,
    nodes: Collection[Node],
    memory_mib: float,
    random: Bool[Tensor, "n r layers q h"] | None = None,
) -> Float[Tensor, "n e vocab"]:
    """Logits of the receiver with the donor's outputs at the nodes, then at r random node sets (e = 1 + r).

    Args:
        receiver: the model that is patched.
        clean: its run on the prompts.
        donor: the other model's run on the same prompts.
        positions: semantic positions of each prompt; nodes at coinciding positions are united.
        nodes: nodes to patch.
        memory_mib: how much memory a pass may take, roughly.
        random: for each prompt, other nodes at the same (sorted) positions; see `random_like`.

    Raises:
        Invalid: the models differ in their heads, the runs in their prompts, or a node or position does not exist.
    """
    if donor.z.shape != clean.z.shape:
        raise Invalid(
            f"head outputs of the donor have shape {list(donor.z.shape)}, of the receiver {list(clean.z.shape)}: must "
            "be two models of one architecture on the same prompts"
        )
    names = sorted({node.position for node in nodes})
    at = stack_positions(positions, names)
    sites = Sites.tail(at, clean.keys.shape[-2], receiver.dtype)
    given = outputs_at(donor.z, at)
    weights = node_weights([nodes], positions, names, receiver.n_layers, receiver.n_heads)
    logits = [exchange_in_parts(receiver, clean, sites, given, weights, memory_mib)]
    if random is not None:
        random = at_all_indices(random, positions, names)
        logits.append(exchange_in_parts(receiver, clean, sites, given, random, memory_mib))
    return torch.cat(logits, dim=1)


def random_like(
    nodes: Collection[Node], n: int, draws: int, n_layers: int, n_heads: int, generator: np.random.Generator
) -> Bool[Tensor, "n draws layers q h"]:
    """For each of n prompts, `draws` random node sets with as many nodes per (sorted) position as given."""
    names = sorted({node.position for node in nodes})
    counts = [sum(node.position == name for node in set(nodes)) for name in names]
    return torch.cat([random_weights(n, counts, n_layers, n_heads, generator) for _ in range(draws)], dim=1)
