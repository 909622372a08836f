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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.architecture import Rotary
from stages.circuits.circuit import Component
from stages.circuits.sweep import Chains, Receivers, Sweep, Tails, read_heads, tail_logits
from stages.circuits.walker import AttentionInputs, Walker, Window

Slopes = dict[int, Float[Tensor, "n s h a"]]  # layer of receivers -> derivative of the measure by its heads' outputs


def slopes(
    walker: Walker,
    receivers: Receivers,
    chains: Chains,
    tails: Tails,
    tokens: Int[Tensor, "n j"] | None,
    measured: Callable[[Float[Tensor, "n e tokens"]], Float[Tensor, "n e"]],
) -> Slopes:
    """The slopes of the measure in the clean run.

    Args:
        chains: of the examples.
        tails: of these.
        tokens: whose logits are made; None for all.
        measured: the measure, from those.
    """
    layers = receivers.layers(walker.n_layers)
    entries = [int(layer >= layers[0]) for layer in range(walker.n_layers + 1)]
    like = tails.residual(layers[0])
    shape = (len(tails.slots), 1, tails.length, walker.n_heads, walker.head_dim)
    # what receivers read stays as it is, whatever lower ones put out: it is written there
    clean = {layer: read_heads(walker, receivers, layer, chains.entering[layer, :, :, None]) for layer in layers}
    with torch.enable_grad():
        added = {layer: like.new_zeros(shape).requires_grad_() for layer in layers}
        logits = tail_logits(walker, receivers, clean, tails, entries, slice(0, 1), tokens, added)
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
    weigh = {Component.Q: _by_queries, Component.K: _by_keys, Component.V: _by_values}[Component(receivers.component)]
    for layer, slope in of.items():
        heads, made = read_heads(walker, receivers, layer, sweep.entering(layer)[few, :, part])
        sets = made.shape[2]
        if sets == 0:
            continue
        clean = read_heads(walker, receivers, layer, sweep.chains.entering[layer, few, :, None])[1]
        inputs = walker.attention_inputs(tails.prefix, window, tails.residual(layer), layer)
        measured = weigh(
            walker, layer, inputs, tails.slots.to(walker.device), slope, heads, torch.cat([clean, made], 2)
        )
        effects[:, :sets] += measured[:, 1:] - measured[:, :1]
    return effects


# The outputs of receivers that read something else at the chains' tokens, times their slopes; what does not depend on
# that is left out, since only differences are used. `read` is by variant, e of them.


def _by_queries(
    walker: Walker,
    layer: int,
    inputs: AttentionInputs,
    slots: Int[Tensor, "n k"],
    slope: Float[Tensor, "n s h a"],
    heads: Int[Tensor, "r"],
    read: Float[Tensor, "n k e r a"],
) -> Float[Tensor, "n e"]:
    """Other queries: other weights for the same values, at these tokens alone."""
    kv = heads // (walker.n_heads // walker.n_kv_heads)
    each = torch.arange(len(slots), device=slots.device)[:, None]
    q = walker.place(layer, "q", read.transpose(1, 2), _at(inputs.rotary, slots))  # n e k r a
    scores = walker.attention_scores(layer, torch.einsum("nekra,ntra->nekrt", q, inputs.k[:, :, kv]))
    weights = (scores + inputs.sees[each, slots][:, None, :, None]).softmax(-1)
    worth = torch.einsum("ntra,nkra->nkrt", inputs.v[:, :, kv], slope[each, slots][:, :, heads])
    return torch.einsum("nekrt,nkrt->ne", weights, worth * _fresh(slots)[:, :, None, None])


def _by_keys(
    walker: Walker,
    layer: int,
    inputs: AttentionInputs,
    slots: Int[Tensor, "n k"],
    slope: Float[Tensor, "n s h a"],
    heads: Int[Tensor, "g"],
    read: Float[Tensor, "n k e g a"],
) -> Float[Tensor, "n e"]:
    """Other keys: other scores at these tokens. With L the log-sum-exp of the scores of all other tokens, O their
    weighted values, and c the scores of these, a head's output is O + sum of softmax(L, c) (v - O)."""
    q, slope = _grouped(walker, inputs.q, heads), _grouped(walker, slope, heads)  # n s g j a
    v, tokens = inputs.v[:, :, heads], inputs.k.shape[1] - inputs.q.shape[1] + slots
    each = torch.arange(len(slots), device=slots.device)[:, None]
    scores = walker.attention_scores(layer, torch.einsum("nsgja,ntga->nsgjt", q, inputs.k[:, :, heads]))
    others = torch.zeros_like(inputs.sees[:, 0]).scatter(1, tokens, float("-inf"))
    scores = scores + (inputs.sees + others[:, None])[:, :, None, None]
    total = scores.logsumexp(-1)
    mean = torch.einsum("nsgjt,ntga->nsgja", scores.softmax(-1).nan_to_num(0.0), v)
    worth = torch.einsum("nkga,nsgja->nsgjk", v[each, tokens], slope) - (mean * slope).sum(-1)[..., None]
    k = walker.place(layer, "k", read.transpose(1, 2), _at(inputs.rotary, slots))  # n e k g a
    here = walker.attention_scores(layer, torch.einsum("nsgja,nekga->nesgjk", q, k))
    sees = inputs.sees.gather(2, tokens[:, None].expand(-1, inputs.sees.shape[1], -1))
    here = here + sees.masked_fill(~_fresh(slots)[:, None], float("-inf"))[:, None, :, None, None]
    total = total[:, None, ..., None].expand(-1, here.shape[1], -1, -1, -1, -1)
    weights = torch.cat([total, here], dim=-1).softmax(-1)[..., 1:]
    return torch.einsum("nesgjk,nsgjk->ne", weights.nan_to_num(0.0), worth)


def _by_values(
    walker: Walker,
    layer: int,
    inputs: AttentionInputs,
    slots: Int[Tensor, "n k"],
    slope: Float[Tensor, "n s h a"],
    heads: Int[Tensor, "g"],
    read: Float[Tensor, "n k e g a"],
) -> Float[Tensor, "n e"]:
    """Other values with the same weights."""
    q, slope = _grouped(walker, inputs.q, heads), _grouped(walker, slope, heads)  # n s g j a
    scores = walker.attention_scores(layer, torch.einsum("nsgja,ntga->nsgjt", q, inputs.k[:, :, heads]))
    weights = (scores + inputs.sees[:, :, None, None]).softmax(-1)
    tokens = inputs.k.shape[1] - inputs.q.shape[1] + slots
    at = tokens[:, None, None, None].expand(*weights.shape[:-1], -1)
    worth = torch.einsum("nsgjk,nsgja->nkga", weights.gather(-1, at), slope)
    return torch.einsum("nkega,nkga->ne", read, worth * _fresh(slots)[:, :, None, None])


def _grouped(walker: Walker, x: Float[Tensor, "n s h a"], heads: Int[Tensor, "g"]) -> Float[Tensor, "n s g j a"]:
    """The query heads of some key-value heads."""
    return x.unflatten(2, (walker.n_kv_heads, -1))[:, :, heads]


def _fresh(slots: Int[Tensor, "n k"]) -> Bool[Tensor, "n k"]:
    """Where a slot is not one that came before: a position may name a token twice."""
    return ~(slots[:, :, None] == slots[:, None, :]).tril(-1).any(-1)


def _at(rotary: Rotary, slots: Int[Tensor, "n k"]) -> Rotary:
    """The rotary embedding of some of the window's slots."""
    if rotary is None:
        return None
    each = torch.arange(len(slots), device=slots.device)[:, None]
    cos, sin = (part.expand(len(slots), *part.shape[1:])[:, 0][each, slots][:, None] for part in rotary)
    return cos, sin
