"""Attention knockout: what a model does when one position may not attend to others in some layers.

The score from one query position to the chosen key positions is taken out of the softmax in every head of a
window of layers (Geva et al., EMNLP 2023; Prakash et al., ICLR 2024, who block every layer from a first one on).
A curve over windows shows in which layers that path carries what the answer needs. It is exact at the cost of a
tail pass, without a second kind of attention:

1. Positions before the query cannot change, so a clean run is their background, and only the query and what
   follows it are computed.
2. The query stands in the window twice: once as usual, and once as a *twin* that nothing attends to and that does
   not see the blocked keys.
3. After the attention of each layer both take the twin's head outputs where the variant blocks that layer, and the
   usual ones elsewhere. So they always have one residual stream, and each variant has its own window of layers in
   the same pass.
4. In the last layer only the last window slot is computed. Variants that block it go through a second pass, in which
   that slot is one more copy of the last position, blind to the keys where the last position is the query.
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.circuits.budget import MIB
from stages.circuits.exchange import Reduce, at_positions, in_parts, whole_logits
from stages.circuits.walker import Run, Walker, Window
from stages.pipeline.stage import Invalid


def layer_windows(n_layers: int, width: int) -> list[range]:
    """Windows of `width` layers around every central layer, cut off at both ends; of an even width the lower half is
    the longer one."""
    if width < 1:
        raise Invalid(f"a knockout window of {width} layers is empty: must be 1 or more")
    starts = [centre - width // 2 for centre in range(n_layers)]
    return [range(max(0, start), min(n_layers, start + width)) for start in starts]


@torch.no_grad()
def knocked_out(
    walker: Walker,
    clean: Run,
    query: Int[Tensor, " n"],
    keys: Int[Tensor, "n k"],
    windows: Sequence[Collection[int]],
    memory_mib: float,
    reduce: Reduce = whole_logits,
) -> Tensor:
    """What is read out at the last position when `query` cannot attend to `keys` in the layers of each window.

    Examples that stand in the order of their query position take the least time.

    Args:
        walker: the model.
        clean: its run on the prompts.
        query: the position that is blinded, in each example.
        keys: the positions that it cannot see; a position may be named twice.
        windows: the layers in which it is blinded, one set for each variant.
        memory_mib: how much memory passes may take, beside the run and what is read out.
        reduce: what is read out of the logits, see `exchange.Reduce`; by default all of them.

    Returns:
        [n e ...] on the CPU.

    Raises:
        Invalid: a key is not before its query (an attention head needs something left to see), or a window names a
            layer that the model does not have.
    """
    length = clean.residual.shape[2]
    if bool((keys < 0).any()) or bool((keys >= query[:, None]).any()) or bool((query >= length).any()):
        raise Invalid(
            f"knocked-out keys reach position {int(keys.max())} and queries position {int(query.max())} of prompts of "
            f"{length} tokens: every key must be before its query, and every query inside the prompt"
        )
    beyond = sorted({layer for window in windows for layer in window} - set(range(walker.n_layers)))
    if beyond:
        raise Invalid(f"knockout of layer {beyond[0]}: the model has layers 0 to {walker.n_layers - 1}")
    found: dict[int, Tensor] = {}
    for last in (False, True):
        some = [number for number, window in enumerate(windows) if (walker.n_layers - 1 in window) == last]
        blocked = torch.tensor(
            [[layer in windows[number] for layer in range(walker.n_layers)] for number in some],
            dtype=torch.bool,
            device="cpu",
        ).view(1, len(some), walker.n_layers)

        def logits(rows: slice, part: Bool[Tensor, "1 e layers"], last: bool = last) -> Float[Tensor, "n e vocab"]:
            at = query[rows].to(walker.device), keys[rows].to(walker.device)
            return _pass(walker, clean.select(rows), *at, part[0], last)

        def slots(rows: slice) -> int:
            """One for each position from the earliest query on, the twin, and perhaps a copy of the last."""
            return length - int(query[rows].min()) + 2

        if some:
            read = in_parts(walker, blocked, len(query), slots, length, memory_mib * MIB, logits, reduce)
            found |= dict(zip(some, read.unbind(1), strict=True))
    if not windows:
        return reduce(clean.logits[:, None][:, :0], slice(0, len(query))).cpu()
    return torch.stack([found[number] for number in range(len(windows))], dim=1)


def _pass(
    walker: Walker,
    clean: Run,
    query: Int[Tensor, " n"],
    keys: Int[Tensor, "n k"],
    blocked: Bool[Tensor, "e layers"],
    last_layer: bool,
) -> Float[Tensor, "n e vocab"]:
    """All variants at once; either all or none of them block the last layer."""
    length = clean.residual.shape[2]
    lowest = int(blocked.any(0).int().argmax()) if bool(blocked.any()) else walker.n_layers - 1
    window, twin = _window(query, keys, length, last_layer, walker.dtype)

    def edit(layer: int, site: str, x: Tensor, first: int) -> Tensor:
        if site != "z" or first > 0:  # in the last layer the one slot that is left sees what it should
            return x
        use_twin = blocked[:, layer, None, None, None]
        twin_z = x[:, :, :1]
        usual_z = x.gather(2, twin[:, None, None, None, None].expand_as(twin_z))
        new = torch.where(use_twin, twin_z, usual_z)
        x = x.scatter(2, twin[:, None, None, None, None].expand_as(new), new)
        x[:, :, :1] = new
        if last_layer:
            x[:, :, -1] = x[:, :, -2]  # the copy of the last position
        return x

    entering = at_positions(clean.residual[lowest], window.positions)[:, None].expand(-1, len(blocked), -1, -1)
    return walker.continue_from(clean, window, entering, lowest, edit)


def _window(
    query: Int[Tensor, " n"], keys: Int[Tensor, "n k"], length: int, copy_of_last: bool, dtype: torch.dtype
) -> tuple[Window, Int[Tensor, " n"]]:
    """Slots: the query's twin, every position from the earliest query on, and perhaps a copy of the last one.

    Returns:
        the window, and the slot of the query itself in each example.
    """
    start, n, device = int(query.min()), len(query), query.device
    tail = torch.arange(start, length, device=device).expand(n, -1)
    copies = [tail[:, -1:]] if copy_of_last else []
    positions = torch.cat([query[:, None], tail, *copies], dim=1)
    slots = positions.shape[1]
    everywhere = torch.arange(length, device=device)
    sees = everywhere <= positions[:, :, None]  # n s t
    is_key = (everywhere[None, None] == keys[:, :, None]).any(1)  # n t
    sees[:, 0] &= ~is_key
    if copy_of_last:
        sees[:, -1] &= ~(is_key & (query == length - 1)[:, None])
    to_tail = sees[:, :, start:]
    own = torch.zeros(n, slots, slots, dtype=torch.bool, device=device)
    own[:, :, 1 : 1 + tail.shape[1]] = to_tail
    # nothing sees the twin or the copy, not even they themselves: they see the slot that has their residual stream
    masks = (
        torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        for seen in (sees[..., :start], own)
    )
    return Window(positions, *masks), 1 + query - start
