"""Bad input of the causal engine, refused in one sentence before any work.

Prompts of unequal length are refused rather than padded: the engine takes one tensor of equal-length prompts, and
examples are grouped by their positions inside it. Group longer and shorter prompts by length and patch each group.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stages.circuits.circuit import LAST
from stages.pipeline.stage import Invalid


def check_tokens(ids: Int[Tensor, "n t"], vocab_size: int, longest: int | None, what: str = "input_ids") -> None:
    """Token ids that the model knows, in prompts that it can take.

    Raises:
        Invalid: there are no tokens, an id is outside the vocabulary, or prompts are longer than `longest`.
    """
    if ids.numel() == 0:
        raise Invalid(f"{what} has shape {list(ids.shape)}: must hold at least one prompt of at least one token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise Invalid(f"{what} holds token id {low if low < 0 else high}: must be from 0 to {vocab_size - 1}")
    if longest is not None and ids.shape[1] > longest:
        raise Invalid(f"{what} holds prompts of {ids.shape[1]} tokens: this model takes at most {longest}")


@dataclass(frozen=True)
class Padding:
    """What counts as padding in prompts of a model.

    Attributes:
        token: id of the padding token, if there is one.
        begins: ids of tokens that texts begin with.
        run: how many of them in a row are padding.
    """

    token: int | None
    begins: tuple[int, ...]
    run: int


def padding_of(config: Any) -> Padding:
    """Read off a Hugging Face config, whose ids may be lists.

    A model without a padding token is padded with the end of a text by habit (GPT-2, Llama). One of these at the start
    or the end of a prompt may be meant, two are padding.
    """
    begins, ends = _ids(getattr(config, "bos_token_id", None)), _ids(getattr(config, "eos_token_id", None))
    pad = _ids(getattr(config, "pad_token_id", None))
    if pad:
        return Padding(pad[0], begins, 1)
    return Padding(ends[0] if ends else None, begins, 2)


def _ids(entry: int | Iterable[Any] | None) -> tuple[int, ...]:
    """The ids in nested lists of them; some configs write -1 for none."""
    if entry is None or isinstance(entry, int):
        return () if entry is None or entry < 0 else (entry,)
    return tuple(one for several in entry for one in _ids(several))


def check_padding(
    ids: Int[Tensor, "n t"],
    pad: int | None,
    begins: int | Iterable[Any] | None,
    what: str,
    run: int = 1,
) -> None:
    """No padding at either end of a prompt: positions would count it, and tokens attend to it.

    Args:
        pad: id of the padding token, if there is one; that it is the end of a text too, as with many tokenizers, makes
            it no less of a padding.
        begins: ids of tokens that texts begin with; if one is the padding token, one of it at the start is in order.
        run: how many padding tokens in a row are padding.

    Raises:
        Invalid: a prompt starts or ends with the padding token.
    """
    if pad is None:
        return
    here = (ids == pad).int()
    leading, trailing = here.cumprod(1).sum(1), here.flip(1).cumprod(1).sum(1)
    trailing = trailing * (trailing < ids.shape[1])  # a prompt of nothing else is judged by its start
    padded = (leading >= max(run, 2 if pad in _ids(begins) else 1)) | (trailing >= run)
    if bool(padded.any()):
        raise Invalid(
            f"{what}: prompt {int(padded.int().argmax())} starts or ends with the padding token {pad}: pass prompts "
            "without padding, grouped by length (a walker made with pad=None takes that token for an ordinary one)"
        )


def check_positions(positions: Mapping[str, Int[Tensor, "n"]], n: int, length: int, what: str = "positions") -> None:
    """One absolute position a prompt for every semantic position.

    Raises:
        Invalid: there is none, one has another length than the prompts, lies outside them, or "last" is not the last.
    """
    if not positions:
        raise Invalid(f"{what} is empty: must name at least one semantic position")
    for name, at in positions.items():
        if at.shape != (n,) or at.dtype.is_floating_point or at.dtype.is_complex:
            raise Invalid(
                f"{what}['{name}'] has shape {list(at.shape)} and type {at.dtype}: must be {n} integers, one a prompt"
            )
        outside = (at < 0) | (at >= length)
        if bool(outside.any()):
            row = int(outside.int().argmax())
            raise Invalid(f"{what}['{name}'] of example {row} = {int(at[row])}: must be from 0 to {length - 1}")
    if LAST in positions and bool((positions[LAST] != length - 1).any()):
        row = int((positions[LAST] != length - 1).int().argmax())
        raise Invalid(
            f"{what}['{LAST}'] of example {row} = {int(positions[LAST][row])}: must be {length - 1}, the last of "
            f"{length} tokens; prompts must have equal length without padding: group them by length"
        )


def check_sites(positions: Int[Tensor, "n p"], length: int) -> None:
    """Positions inside the prompts.

    Raises:
        Invalid: there is none, or one is outside.
    """
    if positions.numel() == 0:
        raise Invalid(f"sites have shape {list(positions.shape)}: must be at least one position of at least one prompt")
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= length:
        raise Invalid(f"site at position {low if low < 0 else high}: must be from 0 to {length - 1}")


def check_name(name: str, positions: Iterable[str]) -> None:
    """A semantic position that the examples have.

    Raises:
        Invalid: they do not.
    """
    known = sorted(positions)
    if name not in known:
        raise Invalid(f"position '{name}': must be one of {', '.join(known)}")


def check_heads(heads: Iterable[tuple[int, int]], n_layers: int, n_heads: int, what: str) -> None:
    """(layer, head) pairs that the model has.

    Raises:
        Invalid: a layer or a head is outside the model.
    """
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise Invalid(
                f"{what} {layer}.{head}: must be a layer from 0 to {n_layers - 1} and a head from 0 to {n_heads - 1}"
            )


def check_finite(x: Tensor, what: str) -> None:
    """Numbers, one for each example, in which neither nan nor inf occurs.

    Raises:
        Invalid: one does; the sentence says for which example.
    """
    wrong = ~torch.isfinite(x)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise Invalid(f"{what} is {float(x[row])} in example {row}: must be a finite number")
