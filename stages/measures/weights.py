"""How far the weights moved: in all, per tensor, and per attention head."""

import math

import torch
from torch import Tensor, nn

from stages.pipeline.stage import Invalid

Norms = dict[str, float]


def changes(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """Tuned minus base for every parameter, in float64."""
    before = dict(base.named_parameters())
    return {name: w.detach().double() - before[name].detach().double() for name, w in tuned.named_parameters()}


def per_matrix(base: nn.Module, tuned: nn.Module) -> tuple[Norms, Norms]:
    """Frobenius norm of each parameter's change, and the same divided by the parameter's norm in the base."""
    change = changes(base, tuned)
    size = {name: w.detach().double().norm().item() for name, w in base.named_parameters()}
    absolute = {name: delta.norm().item() for name, delta in change.items()}
    return absolute, {name: norm / size[name] if size[name] > 0 else 0.0 for name, norm in absolute.items()}


def whole(base: nn.Module, tuned: nn.Module) -> tuple[float, float]:
    """Euclidean norm of the whole change, and the same divided by the norm of all base weights."""
    change = math.sqrt(sum(delta.square().sum().item() for delta in changes(base, tuned).values()))
    return change, change / math.sqrt(sum(w.detach().double().square().sum().item() for w in base.parameters()))


def per_head(
    base: nn.Module, tuned: nn.Module, n_heads: int, n_key_value_heads: int
) -> list[tuple[int, int, float, float]]:
    """How far each head's weights moved: rows [layer, head, norm, norm relative to the head's base weights].

    A head owns its rows of the query matrix and its columns of the output matrix, and reads through its rows
    of the key and value matrices. With grouped queries several heads share those, and the shared change
    counts for each of them.

    Args:
        base, tuned: models whose attention has `q_proj`, `k_proj`, `v_proj` and `o_proj` (Llama and its
            relatives).

    Raises:
        Invalid: the models name their attention weights otherwise.
    """
    before, change = dict(base.named_parameters()), changes(base, tuned)
    queries = [name for name in change if name.endswith("self_attn.q_proj.weight")]
    if not queries:
        raise Invalid(f"{type(base).__name__} has no self_attn.q_proj weights; only Llama-like attention is supported")
    rows = []
    for layer, query in enumerate(queries):  # parameters are named in the order of the layers
        stem = query.removesuffix("q_proj.weight")
        for head in range(n_heads):
            shared = head * n_key_value_heads // n_heads
            slices = [
                ("q", head, n_heads),
                ("k", shared, n_key_value_heads),
                ("v", shared, n_key_value_heads),
            ]
            slices.append(("o", head, n_heads))
            norms = []
            for weights in (change, before):
                parts = []
                for kind, index, count in slices:
                    matrix = weights[f"{stem}{kind}_proj.weight"].detach().double()
                    parts.append(matrix.chunk(count, dim=1 if kind == "o" else 0)[index].square().sum())
                norms.append(torch.stack(parts).sum().sqrt().item())
            rows.append((layer, head, norms[0], norms[0] / norms[1] if norms[1] > 0 else 0.0))
    return rows
