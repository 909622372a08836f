"""Attention of the positions that a pass computes, to each other and to a background that was computed before.

Shapes: n examples, e variants, s window slots, b background positions, h query heads, g key-value heads, a head width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# From so many queries on the fused kernel pays for copying the background; on a processor it is then up to 2.5 times as
# fast, since it writes no attention scores to memory.
FUSED_SLOTS = 16


@dataclass(frozen=True)
class Window:
    """The positions that a pass computes, and what they can see.

    Attributes:
        positions: window slots, increasing along s.
        sees_background: additive mask, 0 where a slot attends to a background position, -inf elsewhere.
        sees_window: additive mask between window slots.
    """

    positions: Int[Tensor, "n s"]
    sees_background: Float[Tensor, "n s b"]
    sees_window: Float[Tensor, "n s s"]

    @staticmethod
    def tail(
        n: int,
        start: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> "Window":
        """All positions from `start` to the last; the background is the prefix before `start`."""
        slots = torch.arange(start, length, device=device).expand(n, length - start)
        causal = _mask(slots[:, None, :] <= slots[:, :, None], dtype)
        return Window(slots, torch.zeros(n, length - start, start, dtype=dtype, device=device), causal)

    @staticmethod
    def scattered(
        positions: Int[Tensor, "n s"],
        length: int,
        live: Bool[Tensor, "n s"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Window":
        """Any positions, increasing along s; every other position of the prompt is background.

        Args:
            positions: a position may be repeated only in slots that are not live.
            length: number of positions t of the prompt.
            live: slots that count; a slot that is not live (padding) is computed, but nothing attends to it.
        """
        (n, s), device = positions.shape, positions.device
        live = torch.ones(n, s, dtype=torch.bool, device=device) if live is None else live
        in_window = torch.zeros(n, length, dtype=torch.bool, device=device)
        rows = torch.arange(n, device=device)[:, None].expand(n, s)
        in_window[rows[live], positions[live]] = True
        everywhere = torch.arange(length, device=device)
        earlier = everywhere[None, None, :] <= positions[:, :, None]
        background = _mask(earlier & ~in_window[:, None, :], dtype)
        visible = (positions[:, None, :] <= positions[:, :, None]) & live[:, None, :]
        # a padding slot sees itself, so that its softmax is defined
        visible |= torch.eye(s, dtype=torch.bool, device=device)
        return Window(positions, background, _mask(visible, dtype))

    def within(self, reach: int | None) -> "Window":
        """The same slots when each sees only the `reach` tokens up to itself (a sliding window; None: all)."""
        if reach is None or int(self.positions.max()) < reach:
            return self
        places = torch.arange(self.sees_background.shape[-1], device=self.positions.device)
        far_background = self.positions[:, :, None] - places >= reach
        far_window = self.positions[:, :, None] - self.positions[:, None, :] >= reach
        return Window(
            self.positions,
            self.sees_background.masked_fill(far_background, float("-inf")),
            self.sees_window.masked_fill(far_window, float("-inf")),
        )


def attend(
    q: Float[Tensor, "n e s h a"],
    k: Float[Tensor, "n e w g a"],
    v: Float[Tensor, "n e w g a"],
    background_keys: Float[Tensor, "n g b a"],
    background_values: Float[Tensor, "n g b a"],
    sees_background: Float[Tensor, "n s b"],
    sees_window: Float[Tensor, "n s w"],
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "n e s h a"]:
    """Attention of s queries to b background positions and w window slots; background keys are shared by variants.

    Every h / g query heads in a row share a key-value head.
    """
    n, e, s, h, a = q.shape
    w, g = k.shape[2], k.shape[3]
    b = background_keys.shape[2]
    if q.device.type == "cpu" and softcap is None and s >= FUSED_SLOTS:
        return _attend_fused(q, k, v, background_keys, background_values, sees_background, sees_window, scaling)
    r = h // g  # query heads per key-value head
    rows, all_rows = (n * g, e * s * r), (n * g * e, s * r)  # of one background, of one variant
    q = (q * scaling).reshape(n, e, s, g, r, a).permute(0, 3, 1, 2, 4, 5).reshape(*rows, a)
    k, v = (x.permute(0, 3, 1, 2, 4).reshape(n * g * e, w, a) for x in (k, v))
    to_background = torch.bmm(q, background_keys.reshape(n * g, b, a).transpose(1, 2)).view(n, g, e, s, r, b)
    to_window = torch.bmm(q.reshape(*all_rows, a), k.transpose(1, 2)).view(n, g, e, s, r, w)
    scores = soft_capped(torch.cat([to_background, to_window], dim=-1), softcap)
    scores = scores + torch.cat([sees_background, sees_window], dim=-1)[:, None, None, :, None]
    # softmax in at least float32, as Hugging Face's eager attention does
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    z = torch.bmm(weights.reshape(*all_rows, b + w)[..., b:], v).view(*rows, a)
    z = torch.baddbmm(z, weights.reshape(*rows, b + w)[..., :b], background_values.reshape(n * g, b, a))
    return z.reshape(n, g, e, s, r, a).permute(0, 2, 3, 1, 4, 5).reshape(n, e, s, h, a)


def soft_capped(x: Float[Tensor, "*shape"], softcap: float | None) -> Float[Tensor, "*shape"]:
    """Attention scores or logits as a family bounds them, softly; as they are where it does not."""
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def _attend_fused(
    q: Float[Tensor, "n e s h a"],
    k: Float[Tensor, "n e w g a"],
    v: Float[Tensor, "n e w g a"],
    background_keys: Float[Tensor, "n g b a"],
    background_values: Float[Tensor, "n g b a"],
    sees_background: Float[Tensor, "n s b"],
    sees_window: Float[Tensor, "n s w"],
    scaling: float,
) -> Float[Tensor, "n e s h a"]:
    """The same by torch's fused kernel: no tensor of scores, but a copy of the background for every variant."""
    n, e, s, h, a = q.shape

    def seen(background: Float[Tensor, "n g b a"], window: Float[Tensor, "n e w g a"]) -> Float[Tensor, "m g t a"]:
        window = window.transpose(2, 3)
        return torch.cat([background[:, None].expand(-1, e, -1, -1, -1), window], dim=3).flatten(0, 1)

    k, v = seen(background_keys, k), seen(background_values, v)
    mask = torch.cat([sees_background, sees_window], dim=-1)[:, None, None].expand(-1, e, -1, -1, -1).flatten(0, 1)
    q = q.transpose(2, 3).flatten(0, 1)
    z = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=h != k.shape[1])
    return z.transpose(1, 2).reshape(n, e, s, h, a)


def _mask(visible: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
