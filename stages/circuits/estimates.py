"""First-order estimates of path patching effects, for a search that patches one by one only the heads that may matter.

What a sender changes in the input of the receivers, and what these then put out, is exact and cheap: a sweep (`sweep`)
and their attention. Dear is the tail, which runs from there to the logits once for every sender. Here it is replaced by
its slope, the gradient of the measure with respect to the receivers' outputs in the clean run (attribution patching;
Nanda 2023, on edges Syed et al. 2023), which costs one pass for all senders together. The receivers' attention is not
made linear: where it is saturated its slope is near 0, whatever is patched. Nothing is selected by estimates alone;
they say what to patch.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.circuit import Component
from stages.circuits.sweep import Read, Receivers, Sweep, Tails, read_heads, tail_logits, write
from stages.circuits.walker import Walker, Window

Slopes = dict[int, Float[Tensor, "n s h a"]]  # layer of receivers -> derivative of the measure by its heads' outputs


def slopes(
    walker: Walker,
    receivers: Receivers,
    tails: Tails,
    tokens: Int[Tensor, "n j"] | None,
    measured: Callable[[Float[Tensor, "n e tokens"]], Float[Tensor, "n e"]],
) -> Slopes:
    """The slopes of the measure in the clean run.

    Args:
        tokens: whose logits are made; None for all.
        measured: the measure, from those.
    """
    layers = receivers.layers(walker.n_layers)
    entries = [int(layer >= layers[0]) for layer in range(walker.n_layers + 1)]
    like = tails.residual(layers[0])
    shape = (len(tails.slots), 1, tails.length, walker.n_heads, walker.head_dim)
    with torch.enable_grad():
        added = {layer: like.new_zeros(shape).requires_grad_() for layer in layers}
        logits = tail_logits(walker, receivers, {}, tails, entries, slice(0, 1), tokens, added)
        found = torch.autograd.grad(measured(logits).sum(), list(added.values()))
    return {layer: slope[:, 0] for layer, slope in zip(layers, found, strict=True)}


def estimated(
    walker: Walker,
    receivers: Receivers,
    sweep: Sweep,
    few: slice,
    tails: Tails,
    of: Slopes,
    part: slice,
) -> Float[Tensor, "n f"]:
    """What sets of senders do to the measure, by the slopes of their receivers' outputs.

    Args:
        sweep: of the sets.
        few: which examples of the sweep; the tails and slopes are theirs.
        part: which of the sets that reach a receiver.
    """
    n, start = len(tails.slots), tails.prefix.keys.shape[3]
    window = Window.tail(n, start, start + tails.length, walker.dtype, walker.device)
    effects = next(iter(of.values())).new_zeros(n, part.stop - part.start)
    each = walker.n_heads // walker.n_kv_heads
    for layer, slope in of.items():
        chosen, made = read_heads(walker, receivers, layer, sweep.entering(layer)[few, :, part])
        sets = made.shape[2]
        if sets == 0:
            continue
        clean = read_heads(walker, receivers, layer, sweep.chains.entering[layer, few, :, None])[1]
        # only what can change is computed: key-value heads that are receivers or are read by them, numbered from 0
        size = each if receivers.component == Component.Q else 1
        groups = sorted({head // size for head in chosen.tolist()})
        numbers = torch.tensor([groups.index(head // size) * size + head % size for head in chosen.tolist()])
        read: Read = {layer: (numbers.to(chosen.device), torch.cat([clean, made], dim=2))}
        edit = write(receivers.component, read, tails.slots, slice(0, 1 + sets))
        z = walker.edited_heads(tails.prefix, window, tails.residual(layer), layer, groups, edit, 1 + sets)
        heads = [group * each + number for group in groups for number in range(each)]
        effects[:, :sets] += torch.einsum("nesha,nsha->ne", z[:, 1:] - z[:, :1], slope[:, :, heads])
    return effects
