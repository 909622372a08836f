"""Does an adapter describe this model? Asked whenever a walker is made, block by block and site by site.

The Hugging Face model runs once, on two random prompts of 20 tokens. At every site of every block (q and k as
attention compares them, v, the mask, z, the attention output, the block's output) the adapter gets what Hugging Face's
own code had in front of that site, and must give what that code gave. So nothing accumulates: neither rounding, which
in bfloat16 sets Hugging Face's own attention implementations 5e-2 apart after some layers, nor a mistake, which is
named by layer and site.

- Scale. A difference is taken relative to what could round: each head's largest entry at this token for q, k and v; its
  largest value at any token for z; this token's largest entry for the attention output; and for the block's output each
  entry of the stream plus the largest that the block wrote at this token. One token with huge activations (21,800 in
  the stream of SmolLM2) neither excuses the other tokens nor is refused for its own rounding.
- Tolerance. Four roundings of the model's precision, at least 1e-4: 3.1e-2 in bfloat16, where the families keep below
  1.5e-2. Attention is compared in float32 or better, on the q, k and v that the model had, within 1e-4 always.
- Mask. Hugging Face makes it from a function of the two positions. It is compared whole on the prompts, and for the
  last query that the model's positions allow (131,071 at most) on all keys before it. So a sliding window of 4,096 is
  checked to the token, and no prompt of that length is run.
- Rotary embedding. The prompts stand at the last positions up to 16,384 that the model allows, where angles of slow
  dimensions are large too.

The model runs with Hugging Face's eager attention; its setting is put back.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from stages.circuits.architecture import Architecture
from stages.circuits.attention import Window, attend
from stages.pipeline.stage import Invalid

PROMPTS, LENGTH = 2, 20  # long enough for the fused kernel
TAIL = 4  # queries that are also asked with the rest of the prompt as background
ROUNDINGS, LEAST = 4, 1e-4  # tolerance, in units of the precision, and at least
FARTHEST_POSITION, FARTHEST_QUERY = 2**14, 2**17
RECORDED = "recorded_eager"

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Attention:
    """What Hugging Face handed to attention in one layer, and what eager attention makes of it in float32 or better."""

    q: Float[Tensor, "n t h a"]
    k: Float[Tensor, "n t g a"]
    v: Float[Tensor, "n t g a"]
    mask: Float[Tensor, "#n 1 t t"] | None
    z: Float[Tensor, "n t h a"]


@dataclass(frozen=True)
class Recorded:
    """What one run of the Hugging Face model had at the borders of its modules.

    Attributes:
        entering, leaving: residual stream before and after each block.
        z, attention: what enters and leaves each output projection.
        attentions: see there.
        masks: the masks that were made, each with the function that it was made from.
        logits: at the last token.
    """

    entering: list[Float[Tensor, "n t d"]]
    leaving: list[Float[Tensor, "n t d"]]
    z: list[Float[Tensor, "n t outputs"]]
    attention: list[Float[Tensor, "n t d"]]
    attentions: list[Attention]
    masks: list[tuple[Tensor, MaskFunction]]
    logits: Float[Tensor, "n vocab"]


@dataclass(frozen=True)
class Difference:
    """How far the adapter is from Hugging Face at one site, relative to the site's scale, and how far it may be."""

    site: str
    error: float
    tolerance: float


@torch.no_grad()
def check_reproduces(model: Any, family: Architecture, kv_head: Callable[[int], int]) -> None:
    """Raises:
    Invalid: the adapter does not describe the model; the sentence names layer and site.
    """
    for found in differences(model, family, kv_head):
        if not found.error <= found.tolerance:  # nan is no agreement
            raise Invalid(
                f"the walker does not reproduce this model at {found.site}: off by {found.error:.1e} of the size of "
                f"what Hugging Face computes, where rounding gives at most {found.tolerance:.1e}"
            )


def differences(model: Any, family: Architecture, kv_head: Callable[[int], int]) -> Iterator[Difference]:
    """The differences at every site, bottom to top.

    Raises:
        Invalid: a mask differs, or query heads follow other key-value heads than `kv_head` says.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    length = min(LENGTH, family.longest or LENGTH)
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(0, family.vocab_size, (PROMPTS, length), generator=generator, device="cpu").to(device)
    most = getattr(family.config, "max_position_embeddings", length)
    first = 0 if family.longest is not None else max(0, min(most, FARTHEST_POSITION) - length)
    theirs = _recorded(model, family, ids, first)

    tolerance = max(ROUNDINGS * torch.finfo(dtype).eps, LEAST)
    window = Window.tail(PROMPTS, 0, length, dtype, device)
    x = family.embed(ids)
    yield Difference("the embedding", _largest(x - theirs.entering[0], _per_token(theirs.entering[0])), tolerance)
    rotary = family.rotary(x[:, None], window.positions + first)
    looked_at: set[tuple[int, int | None]] = set()
    for layer in range(family.n_layers):
        entering, leaving, at = theirs.entering[layer], theirs.leaving[layer], f"of layer {layer}"
        if layer > 0:
            step = entering - theirs.leaving[layer - 1]
            yield Difference(f"what enters the block {at}", _largest(step, _per_token(entering)), tolerance)
        had = theirs.attentions[layer]

        normed = family.normed(layer, entering[:, None])
        projected = {site: family.project(layer, site, normed) for site in "qkv"}
        ours = {site: family.place(layer, site, projected[site], rotary[layer]) for site in "qk"}
        ours["v"] = projected["v"]
        for site in "qkv":
            wanted: Tensor = getattr(had, site)
            scale = wanted.abs().amax(-1, keepdim=True)
            yield Difference(f"{site} {at}", _largest(ours[site][:, 0] - wanted, scale), tolerance)
        for site, together in zip("qkv", family.projections(layer, normed, 1), strict=True):
            alone = projected[site][:, :, 1:] if site == "q" else projected[site]
            error = _largest(together - alone, alone.abs().amax(-1, keepdim=True))
            yield Difference(f"{site} {at}, projected with the others", error, tolerance)

        _check_mask(theirs, layer, family.reach(layer), window, looked_at, min(most, FARTHEST_QUERY))
        scale = had.v.abs().amax((1, 3)).repeat_interleave(family.n_heads // family.n_kv_heads, 1)[:, None, :, None]
        whole, tail = _attended(family, layer, had, 0), _attended(family, layer, had, max(1, length - TAIL))
        yield Difference(f"z {at}", _largest(whole - had.z, scale), LEAST)
        error = _largest(tail - had.z[:, -tail.shape[1] :], scale)
        yield Difference(f"z {at}, with a background", error, LEAST)
        if layer == 0:
            _check_kv_heads(family, had, kv_head, whole, scale)

        z, attention = theirs.z[layer].unflatten(-1, (family.n_heads, family.head_dim)), theirs.attention[layer]
        error = _largest(family.attention_output(layer, z) - attention, _per_token(attention))
        yield Difference(f"the attention output {at}", error, tolerance)
        writes, bias = family.head_writes(layer, z), family.output_projection(layer).bias
        parts = writes.to(had.z.dtype).sum(-2) + (0 if bias is None else bias)
        scale = torch.maximum(writes.abs().amax((-1, -2))[..., None], _per_token(attention))
        yield Difference(
            f"the sum of what heads write to the attention output {at}", _largest(parts - attention, scale), tolerance
        )

        written = _per_token(leaving - entering)
        error = _largest(
            family.after_attention(layer, entering, attention) - leaving, entering.abs() + leaving.abs() + written
        )
        yield Difference(f"the output of the block {at}", error, tolerance)

    last = theirs.leaving[-1][:, -1]
    logits, scale = family.logits(last), _per_token(theirs.logits)
    yield Difference("the logits", _largest(logits - theirs.logits, scale), tolerance)
    some = ids[:, :3]
    error = _largest(family.logits(last, some) - theirs.logits.gather(1, some), scale)
    yield Difference("the logits of some tokens", error, tolerance)


def _attended(family: Architecture, layer: int, had: Attention, start: int) -> Float[Tensor, "n s h a"]:
    """z of the queries from `start` on, by the walker's attention; what stands before them is background."""
    exact, (n, length) = had.z.dtype, had.q.shape[:2]
    q, k, v = (x.to(exact)[:, None] for x in (had.q, had.k, had.v))
    keys, values = (x[:, 0, :start].transpose(1, 2) for x in (k, v))
    seen = Window.tail(n, start, length, exact, q.device).within(family.reach(layer))
    return attend(
        q[:, :, start:],
        k[:, :, start:],
        v[:, :, start:],
        keys,
        values,
        seen.sees_background,
        seen.sees_window,
        family.scaling(layer),
        family.softcap(layer),
    )[:, 0]


def _check_kv_heads(
    family: Architecture, had: Attention, kv_head: Callable[[int], int], z: Tensor, scale: Tensor
) -> None:
    """With the keys and values that `kv_head` names, each query head by itself must give the same."""
    heads = torch.tensor([kv_head(head) for head in range(family.n_heads)], device=z.device)
    apart = Attention(had.q, had.k[:, :, heads], had.v[:, :, heads], had.mask, had.z)
    if not _largest(_attended(family, 0, apart, 0) - z, scale) <= LEAST:
        raise Invalid("query heads of this model do not share key-value heads in consecutive groups of equal size")


def _check_mask(
    theirs: Recorded, layer: int, reach: int | None, window: Window, looked_at: set[tuple[int, int | None]], most: int
) -> None:
    """What queries see: every query of the prompts, and the last that the model's positions allow."""
    mask = theirs.attentions[layer].mask
    if (id(mask), reach) in looked_at:
        return
    looked_at.add((id(mask), reach))
    shape = window.sees_window.shape
    theirs_see = (
        torch.ones(shape, dtype=torch.bool, device=window.positions.device) if mask is None else mask[:, 0] == 0
    )
    _compare_masks(theirs_see.expand(shape), window.within(reach).sees_window == 0, 0, layer)
    device = window.positions.device
    for made, function in theirs.masks:
        if made is mask:
            far = sdpa_mask(1, 1, most, most - 1, mask_function=function, allow_is_causal_skip=False, device=device)
            assert far is not None
            one = Window.tail(1, most - 1, most, device=device).within(reach)
            ours_see = torch.cat([one.sees_background, one.sees_window], -1) == 0
            _compare_masks(far[:, 0], ours_see, most - 1, layer)


def _compare_masks(theirs: Tensor, ours: Tensor, first: int, layer: int) -> None:
    """Both [n s t], of queries from position `first` on, to keys from position 0 on."""
    wrong = (theirs != ours).nonzero()
    if len(wrong):
        _, query, key = wrong[0].tolist()
        sees = "sees" if bool(theirs[tuple(wrong[0])]) else "does not see"
        raise Invalid(
            f"the walker does not reproduce this model at the mask of layer {layer}: Hugging Face's query at position "
            f"{first + query} {sees} the key at position {key}"
        )


def _recorded(model: Any, family: Architecture, ids: Int[Tensor, "n t"], first: int) -> Recorded:
    entering, leaving, z, attention = [], [], [], []

    def before(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        entering.append(arguments[0] if arguments else keywords["hidden_states"])

    def after(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        leaving.append(output[0] if isinstance(output, tuple) else output)

    def projected(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        z.append(arguments[0])
        attention.append(output)

    places = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    with ExitStack() as stack:
        attentions, masks = stack.enter_context(_eager(family.config))
        for layer, block in enumerate(family.layers):
            stack.enter_context(_removed(block.register_forward_pre_hook(before, with_kwargs=True)))
            stack.enter_context(_removed(block.register_forward_hook(after)))
            stack.enter_context(_removed(family.output_projection(layer).register_forward_hook(projected)))
        logits = model(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=1).logits[:, -1]
    return Recorded(entering, leaving, z, attention, attentions, masks, logits)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _eager(config: Any) -> Iterator[tuple[list[Attention], list[tuple[Tensor, MaskFunction]]]]:
    """Models of this config attend by their own eager code, in at least float32; what it was given is kept."""
    kept: tuple[list[Attention], list[tuple[Tensor, MaskFunction]]] = ([], [])
    before, token = config._attn_implementation, _kept.set(kept)
    config._attn_implementation = RECORDED
    try:
        yield kept
    finally:
        config._attn_implementation = before
        _kept.reset(token)


_kept: ContextVar[tuple[list[Attention], list[tuple[Tensor, MaskFunction]]]] = ContextVar("kept")


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Any:
    eager = next(
        code.eager_attention_forward
        for code in (sys.modules[ancestor.__module__] for ancestor in type(module).__mro__)
        if hasattr(code, "eager_attention_forward")
    )
    exact = torch.promote_types(query.dtype, torch.float32)
    given = (x.to(exact) for x in (query, key, value))
    z, weights = eager(module, *given, None if mask is None else mask.to(exact), **settings)
    _kept.get()[0].append(Attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, z))
    return z.to(query.dtype), weights


def _mask(**settings: Any) -> Tensor | None:
    mask: Tensor | None = eager_mask(**settings)
    if mask is not None:  # None where every token sees every other
        _kept.get()[1].append((mask, settings["mask_function"]))
    return mask


AttentionInterface.register(RECORDED, _attention)
AttentionMaskInterface.register(RECORDED, _mask)


def _per_token(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
    return x.abs().amax(-1, keepdim=True)


def _largest(difference: Tensor, scale: Tensor) -> float:
    """Largest difference, in units of its scale."""
    return float((difference.abs() / (scale + torch.finfo(scale.dtype).tiny)).max())
