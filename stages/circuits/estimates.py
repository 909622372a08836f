"""First-order estimates of path patching effects, for a search that patches one by one only the heads that may matter.

What a sender changes in the input of the receivers, and what these then put out, is exact and cheap: a sweep (`sweep`)
and their attention. Dear is the tail, which runs from there to the logits once for every sender. Here it is replaced by
its slope, the gradient of the measure with respect to the receivers' outputs in the clean run (attribution patching;
Nanda 2023, on edges Syed et al. 2023), which costs one pass for all senders together. The receivers' attention is not
made linear: where it is saturated its slope is near 0, whatever is patched. Nothing is selected by estimates alone;
they say what to patch.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.architecture import Rotary
from stages.circuits.circuit import Component
from stages.circuits.sweep import Receivers, Sweep, Tails, parts, read_heads, receiving_heads
from stages.circuits.walker import AttentionInputs, Walker

Slopes = dict[int, Float[Tensor, "n s h a"]]  # layer of receivers -> derivative of the measure by its heads' outputs

# what the receivers of a layer read, in e variants -> their outputs times the slopes, up to what they all have
Weigh = Callable[[Float[Tensor, "n k e r a"]], Float[Tensor, "n e"]]


def slopes(
    walker: Walker,
    receivers: Receivers,
    tails: Tails,
    tokens: Int[Tensor, "n j"] | None,
    measured: Callable[[Float[Tensor, "n e tokens"]], Float[Tensor, "n e"]],
) -> Slopes:
    """The slopes of the measure in the clean run; for receivers in one layer whichever of its heads they are, and
    whatever they read.

    Args:
        tails: of the examples.
        tokens: whose logits are made; None for all.
        measured: the measure, from those.
    """
    lowest, *upper = receivers.layers(walker.n_layers)
    shape = (len(tails.slots), 1, tails.length, walker.n_heads, walker.head_dim)
    at_slots = torch.zeros(shape[0], tails.length, dtype=torch.bool, device=walker.device)
    at_slots = at_slots.scatter(1, tails.slots.to(walker.device), True)[:, None, :, None, None]  # n 1 s 1 1

    def edit(layer: int, site: str, x: Tensor, first: int) -> Tensor:
        if site == "z" and layer in added:
            return x + added[layer][:, :, first:]
        if site != receivers.component or layer not in upper:
            return x
        # what receivers read stays as it is, whatever lower ones put out: it is written there
        read = torch.zeros(x.shape[3], 1, dtype=torch.bool, device=x.device)  # heads 1
        read[receiving_heads(walker, receivers, layer)] = True
        return torch.where(at_slots[:, :, first:] & read, x.detach(), x)

    with torch.enable_grad():
        entering = tails.residual(lowest)[:, None]
        added = {layer: entering.new_zeros(shape).requires_grad_() for layer in (lowest, *upper)}
        logits = walker.continue_from(tails.prefix, tails.window, entering, lowest, edit, tokens=tokens)
        found = torch.autograd.grad(measured(logits).sum(), list(added.values()))
    return {layer: slope[:, 0] for layer, slope in zip(added, found, strict=True)}


def estimated(
    walker: Walker, receivers: Receivers, sweep: Sweep, few: slice, tails: Tails, of: Slopes, size: int
) -> Float[Tensor, "n f"]:
    """What those sets of senders that reach a receiver do to the measure, by the slopes of their receivers' outputs.

    Args:
        sweep: of the sets.
        few: which examples of the sweep; the tails and slopes are theirs.
        size: how many sets go at once.
    """
    slots, window, exact = tails.slots.to(walker.device), tails.window, walker.logits_dtype  # as attention scores
    reached = sweep.entering(max(of)).shape[2]
    effects = torch.zeros(len(slots), reached, dtype=exact, device=walker.device)
    weighing = {Component.Q: _by_queries, Component.K: _by_keys, Component.V: _by_values}[
        Component(receivers.component)
    ]
    for layer, slope in of.items():
        streams = sweep.entering(layer)[few]
        heads, clean = read_heads(walker, receivers, layer, sweep.chains.entering[layer, few, :, None])
        inputs = walker.attention_inputs(tails.prefix, window, tails.residual(layer), layer)
        inputs = replace(inputs, v=inputs.v.to(exact))
        weigh = weighing(walker, layer, inputs, slots, slope.to(exact), heads)
        for part in parts(streams.shape[2], size):
            read = read_heads(walker, receivers, layer, streams[:, :, part])[1]
            measured = weigh(torch.cat([clean, read], dim=2))
            effects[:, part] += measured[:, 1:] - measured[:, :1]
    return effects


def _by_queries(
    walker: Walker,
    layer: int,
    inputs: AttentionInputs,
    slots: Int[Tensor, "n k"],
    slope: Float[Tensor, "n s h a"],
    heads: Int[Tensor, "r"],
) -> Weigh:
    """Other queries: other weights for the same values, at these tokens alone."""
    kv = heads // (walker.n_heads // walker.n_kv_heads)
    each = torch.arange(len(slots), device=slots.device)[:, None]
    keys, sees, rotary = inputs.k[:, :, kv], inputs.sees[each, slots][:, None, :, None], _at(inputs.rotary, slots)
    worth = torch.einsum("ntra,nkra->nkrt", inputs.v[:, :, kv], slope[each, slots][:, :, heads])
    worth = worth * _fresh(slots)[:, :, None, None]

    def weigh(read: Float[Tensor, "n k e r a"]) -> Float[Tensor, "n e"]:
        q = walker.place(layer, "q", read.transpose(1, 2), rotary)  # n e k r a
        scores = walker.attention_scores(layer, torch.einsum("nekra,ntra->nekrt", q, keys))
        return torch.einsum("nekrt,nkrt->ne", (scores + sees).softmax(-1), worth)

    return weigh


def _by_keys(
    walker: Walker,
    layer: int,
    inputs: AttentionInputs,
    slots: Int[Tensor, "n k"],
    slope: Float[Tensor, "n s h a"],
    heads: Int[Tensor, "g"],
) -> Weigh:
    """Other keys: other scores at these tokens. With L the log-sum-exp of the scores of all other tokens, O their
    weighted values, and c the scores of these, a head's output is O + sum of softmax(L, c) (v - O)."""
    q, slope = _grouped(walker, inputs.q, heads), _grouped(walker, slope, heads)  # n s g j a
    v, tokens, rotary = inputs.v[:, :, heads], _tokens(inputs, slots), _at(inputs.rotary, slots)
    each = torch.arange(len(slots), device=slots.device)[:, None]
    others = torch.zeros_like(inputs.sees[:, 0]).scatter(1, tokens, float("-inf"))  # n t
    scores = _clean_scores(walker, layer, inputs, heads) + others[:, None, None, None]
    total = scores.logsumexp(-1)[:, None, ..., None]
    mean = torch.einsum("nsgjt,ntga->nsgja", scores.softmax(-1).nan_to_num(0.0), v)
    worth = torch.einsum("nkga,nsgja->nsgjk", v[each, tokens], slope) - (mean * slope).sum(-1)[..., None]
    sees = inputs.sees.gather(2, tokens[:, None].expand(-1, inputs.sees.shape[1], -1))
    sees = sees.masked_fill(~_fresh(slots)[:, None], float("-inf"))[:, None, :, None, None]

    def weigh(read: Float[Tensor, "n k e g a"]) -> Float[Tensor, "n e"]:
        k = walker.place(layer, "k", read.transpose(1, 2), rotary)  # n e k g a
        here = walker.attention_scores(layer, torch.einsum("nsgja,nekga->nesgjk", q, k)) + sees
        weights = torch.cat([total.expand(*here.shape[:-1], 1), here], dim=-1).softmax(-1)[..., 1:]
        return torch.einsum("nesgjk,nsgjk->ne", weights.nan_to_num(0.0), worth)

    return weigh


def _by_values(
    walker: Walker,
    layer: int,
    inputs: AttentionInputs,
    slots: Int[Tensor, "n k"],
    slope: Float[Tensor, "n s h a"],
    heads: Int[Tensor, "g"],
) -> Weigh:
    """Other values with the same weights."""
    weights = _clean_scores(walker, layer, inputs, heads).softmax(-1)
    at = _tokens(inputs, slots)[:, None, None, None].expand(*weights.shape[:-1], -1)
    worth = torch.einsum("nsgjk,nsgja->nkga", weights.gather(-1, at), _grouped(walker, slope, heads))
    worth = worth * _fresh(slots)[:, :, None, None]

    def weigh(read: Float[Tensor, "n k e g a"]) -> Float[Tensor, "n e"]:
        return torch.einsum("nkega,nkga->ne", read.to(worth.dtype), worth)

    return weigh


def _clean_scores(
    walker: Walker, layer: int, inputs: AttentionInputs, heads: Int[Tensor, "g"]
) -> Float[Tensor, "n s g j t"]:
    """Attention scores of the clean run, for the query heads of some key-value heads."""
    q = _grouped(walker, inputs.q, heads)
    scores = walker.attention_scores(layer, torch.einsum("nsgja,ntga->nsgjt", q, inputs.k[:, :, heads]))
    return scores + inputs.sees[:, :, None, None]


def _tokens(inputs: AttentionInputs, slots: Int[Tensor, "n k"]) -> Int[Tensor, "n k"]:
    """Where slots are among the keys: behind the background."""
    return inputs.k.shape[1] - inputs.q.shape[1] + slots


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
