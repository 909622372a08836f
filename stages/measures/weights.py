"""How far the weights moved: in all, per tensor, and per attention head."""

import math

import torch
from torch import Tensor, nn

from stages.circuits.architectures import architecture_of
from stages.pipeline.stage import Invalid

Norms = dict[str, float]


def weight_changes(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """Tuned minus base for every parameter, in float64."""
    before = dict(base.named_parameters())
    return {name: w.detach().double() - before[name].detach().double() for name, w in tuned.named_parameters()}


def per_matrix(base: nn.Module, tuned: nn.Module) -> tuple[Norms, Norms]:
    """Frobenius norm of each parameter's change, and the same divided by the parameter's norm in the base."""
    change = weight_changes(base, tuned)
    size = {name: w.detach().double().norm().item() for name, w in base.named_parameters()}
    absolute = {name: delta.norm().item() for name, delta in change.items()}
    return absolute, {name: norm / size[name] if size[name] > 0 else 0.0 for name, norm in absolute.items()}


def whole(base: nn.Module, tuned: nn.Module) -> tuple[float, float]:
    """Euclidean norm of the whole change, and the same divided by the norm of all base weights."""
    change = math.sqrt(sum(delta.square().sum().item() for delta in weight_changes(base, tuned).values()))
    return change, change / math.sqrt(sum(w.detach().double().square().sum().item() for w in base.parameters()))


def per_head(base: nn.Module, tuned: nn.Module) -> list[tuple[int, int, float, float]]:
    """How far each head's weights moved: rows [layer, head, norm, norm relative to the head's base weights].

    A head owns its rows of the query matrix and its columns of the output matrix, and reads through its rows of the key
    and value matrices, with the biases of these three, where the family has any. With grouped queries several heads
    share keys and values, and the shared change counts for each of them. What all heads of a layer share (norms, the
    bias of the output) is no head's.

    Args:
        base, tuned: models of one family and size.

    Raises:
        Invalid: the family is not supported (`stages.circuits.architectures`), or the models differ in size.
    """
    before, after = architecture_of(base), architecture_of(tuned)
    sizes = [(a.n_layers, a.n_heads, a.n_kv_heads, a.head_dim, a.width) for a in (before, after)]
    if sizes[0] != sizes[1]:
        raise Invalid(
            f"layers, heads, key-value heads, head width and width of base and tuned model are {sizes[0]} and "
            f"{sizes[1]}: must be the same"
        )
    rows = []
    for layer in range(before.n_layers):
        for head in range(before.n_heads):
            size, moved = [], []
            for old, new in zip(before.head_weights(layer, head), after.head_weights(layer, head), strict=True):
                start = old.detach().double()
                size.append(start.square().sum())
                moved.append((new.detach().double() - start).square().sum())
            norm, whole_size = (torch.stack(parts).sum().sqrt().item() for parts in (moved, size))
            rows.append((layer, head, norm, norm / whole_size if whole_size > 0 else 0.0))
    return rows
