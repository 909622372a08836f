"""Slow and obvious ablation, exchange of head outputs and attention knockout: one whole hooked pass per variant."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.circuit import Node
from stages.circuits.exchange import Positions
from tests.oracles import LENGTH, head_outputs, hooked_logits, output_projections, projection

POSITIONS = ("earlier_label", "earlier_separator", "query_label", "last")


def random_prompts(n: int = 6, length: int = LENGTH, vocab: int = 40, seed: int = 0) -> Int[Tensor, "n t"]:
    return torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(seed))


def random_positions(n: int = 6, length: int = LENGTH, seed: int = 0) -> dict[str, Int[Tensor, "n"]]:
    """Positions that differ between examples; in the first two examples some of them coincide. None is further from the
    last than two sliding windows of 8 tokens reach, and all have tokens before them that one of them does not."""
    generator = torch.Generator().manual_seed(seed)
    label = length - 13 + torch.randint(1, 6, (n,), generator=generator)
    separator = label + torch.randint(1, 4, (n,), generator=generator)
    query = torch.full((n,), length - 3)
    separator[0] = label[0]
    query[1] = length - 1
    return {
        "earlier_label": label,
        "earlier_separator": separator,
        "query_label": query,
        "last": torch.full((n,), length - 1),
    }


def several_positions() -> dict[str, Int[Tensor, "n ..."]]:
    """`random_positions` with a second index for those of a clause; it may coincide with a later position."""
    at = random_positions()
    return {**at, **{name: torch.stack([at[name], at[name] + 4], 1) for name in POSITIONS[:2]}}


def random_circuit(n_layers: int, n_heads: int, share: float, seed: int) -> frozenset[Node]:
    """Each (layer, head, position) with the given probability."""
    generator = torch.Generator().manual_seed(seed)
    everything = every_node(n_layers, n_heads)
    chosen = torch.rand(len(everything), generator=generator) < share
    return frozenset(node for node, take in zip(everything, chosen.tolist(), strict=True) if take)


def every_node(n_layers: int, n_heads: int) -> list[Node]:
    return [
        Node(layer, head, position) for layer in range(n_layers) for head in range(n_heads) for position in POSITIONS
    ]


def naive_means(model: PreTrainedModel, ids: Int[Tensor, "n t"]) -> Float[Tensor, "layers t h a"]:
    return _heads(model, torch.stack(head_outputs(model, ids)).mean(1))


def naive_circuit(
    model: PreTrainedModel,
    ids: Int[Tensor, "n t"],
    means: Float[Tensor, "layers t h a"],
    positions: Positions,
    circuit: Collection[Node],
) -> Float[Tensor, "n vocab"]:
    """Every head at every position gives its mean, except the circuit's."""

    def edit(layer: int, z: Tensor) -> Tensor:
        live, out = _heads(model, z), means[layer].expand_as(_heads(model, z)).clone()
        for row in range(len(ids)):
            for node in circuit:
                if node.layer == layer:
                    at = positions[node.position][row]
                    out[row, at, node.head] = live[row, at, node.head]
        return out.flatten(-2)

    return hooked_logits(model, ids, edit)


def naive_exchange(
    model: PreTrainedModel,
    ids: Int[Tensor, "n t"],
    given: Mapping[Node, Float[Tensor, "n a"]],
    positions: Positions,
    shares: Mapping[Node, float],
) -> Float[Tensor, "n vocab"]:
    """Every node gives (1 - share) of its own output and `share` of the given one; all else is live."""

    def edit(layer: int, z: Tensor) -> Tensor:
        out = _heads(model, z).clone()
        for node, share in shares.items():
            if node.layer == layer:
                for row in range(len(ids)):
                    at = positions[node.position][row]
                    live = _heads(model, z)[row, at, node.head]
                    out[row, at, node.head] = (1 - share) * live + share * given[node][row]
        return out.flatten(-2)

    return hooked_logits(model, ids, edit)


def naive_knockout(
    model: PreTrainedModel,
    ids: Int[Tensor, "n t"],
    query: Int[Tensor, "n"],
    keys: Int[Tensor, "n k"],
    layers: Collection[int],
) -> Float[Tensor, "n vocab"]:
    """The attention mask of these layers gets -inf from the query to each key, in every head."""

    def blind(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs["attention_mask"].expand(len(ids), -1, -1, -1).clone()
        for row in range(len(ids)):
            for key in keys[row]:
                mask[row, :, query[row], key] = float("-inf")
        return args, kwargs | {"attention_mask": mask}

    projections = output_projections(model)
    handles = [
        model.get_submodule(projections[layer].rpartition(".")[0]).register_forward_pre_hook(blind, with_kwargs=True)
        for layer in layers
    ]
    try:
        return hooked_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def naive_inputs(
    receiver: PreTrainedModel,
    donor: PreTrainedModel,
    ids: Int[Tensor, "n t"],
    positions: Positions,
    nodes: Collection[Node],
    component: str,
) -> Float[Tensor, "n vocab"]:
    """Every node's q, k or v is what the donor's projection gives on the same prompts; all else is live."""
    slots = {node: projection(receiver, component, node.layer, node.head) for node in nodes}
    names = sorted({name for name, _ in slots.values()})
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def store(output: Tensor) -> Tensor:
            read[name] = output.clone()
            return output

        return store

    hooked_logits(donor, ids, None, {name: keep(name) for name in names})

    def write(name: str) -> Callable[[Tensor], Tensor]:
        def replace(output: Tensor) -> Tensor:
            output = output.clone()
            for node, (owner, columns) in slots.items():
                if owner == name:
                    for row in range(len(ids)):
                        at = positions[node.position][row]
                        output[row, at, columns] = read[name][row, at, columns]
            return output

        return replace

    return hooked_logits(receiver, ids, None, {name: write(name) for name in names})


def outputs_of(
    model: PreTrainedModel,
    ids: Int[Tensor, "n t"],
    positions: Positions,
    nodes: Collection[Node],
) -> dict[Node, Float[Tensor, "n a"]]:
    """Head outputs of nodes in other prompts or another model."""
    z = _heads(model, torch.stack(head_outputs(model, ids)))
    rows = torch.arange(len(ids))
    found = {}
    for node in nodes:
        at = positions[node.position]
        found[node] = z[node.layer, rows if at.ndim == 1 else rows[:, None], at, node.head]
    return found


def _heads(model: PreTrainedModel, z: Tensor) -> Tensor:
    return z.unflatten(-1, (model.config.get_text_config().num_attention_heads, -1))
