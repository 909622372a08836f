"""Step 1 of path patching: clean and corrupt runs, and what is kept of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.pairs import AlignedPairs
from stages.circuits.sweep import Chains, Tails, parts
from stages.circuits.walker import Prefix, Run, Walker


@dataclass(frozen=True)
class CleanRuns:
    """What tails need of clean runs.

    Attributes:
        start: first position of the residual stream that is kept.
        residual: entering each layer, and the final norm.
        keys: after the rotary embedding, up to some position.
        values: likewise.
    """

    start: int
    residual: Float[Tensor, "depths n t d"]
    keys: Float[Tensor, "layers n g b a"]
    values: Float[Tensor, "layers n g b a"]

    @property
    def ends(self) -> tuple[int, int]:
        """Where the residual stream begins, and where keys and values end."""
        return self.start, self.keys.shape[3]

    def cover(self, start: int, reach: int) -> bool:
        """Whether they are enough for tails from `start` on whose prefixes end at `reach` at most."""
        return self.start <= start and reach <= self.keys.shape[3]

    def tails(self, which: Tensor | slice, start: int, at: Int[Tensor, "n k"]) -> Tails:
        """Those of some examples from `start` on.

        Args:
            at: tokens of their position.
        """

        def residual(layer: int) -> Float[Tensor, "n s d"]:
            return self.residual[layer, :, start - self.start :][which]

        prefix = Prefix(self.keys[:, :, :, :start][:, which], self.values[:, :, :, :start][:, which])
        return Tails(at - start, self.residual.shape[2] + self.start - start, residual, prefix)


@torch.no_grad()
def record(
    walker: Walker,
    pairs: AlignedPairs,
    index: Int[Tensor, "n"],
    names: Sequence[str],
    ends: tuple[int, int] | None,
    size: int,
    seen: Callable[[bool, Int[Tensor, "m"], Run], None] | None,
) -> tuple[dict[str, Chains], CleanRuns | None]:
    """Run some examples, a few at a time, since a run holds more than what is kept of it.

    Args:
        names: positions whose chains are made.
        ends: of the clean runs that are kept, see `CleanRuns`; None: they are not.
        size: how many prompts run at once.
        seen: called with every run: is it corrupt, of which examples, the run. Without `seen` and `names` there are
            no corrupt runs.
    """
    n, length, layers = len(index), pairs.clean_ids.shape[1], walker.n_layers
    places = {"dtype": walker.dtype, "device": walker.device}
    chains: dict[str, Chains] = {}
    for name in names:
        k = pairs.spans[name].shape[1]
        entering, attention = (torch.empty(layers, n, k, walker.width, **places) for _ in range(2))
        changes = torch.empty(layers, n, k, walker.n_heads, walker.head_dim, **places)
        chains[name] = Chains(entering, attention, changes)
    kept = None
    if ends is not None:
        residual = torch.empty(layers + 1, n, length - ends[0], walker.width, **places)
        shape = layers, n, walker.n_kv_heads, ends[1], walker.head_dim
        kept = CleanRuns(ends[0], residual, torch.empty(*shape, **places), torch.empty(*shape, **places))
    outputs = ["z"] if names else []
    for part in parts(n, size):
        chosen = index[part]
        rows = torch.arange(len(chosen), device=walker.device)[:, None]
        keep = ["residual", *outputs, *(["keys", "values"] if kept is not None else [])]
        run = walker.run(pairs.clean_ids[chosen].to(walker.device), keep=keep)
        if kept is not None:
            kept.residual[:, part] = run.residual[:, :, kept.start :]
            kept.keys[:, part] = run.keys[:, :, :, : kept.keys.shape[3]]
            kept.values[:, part] = run.values[:, :, :, : kept.keys.shape[3]]
        for name, made in chains.items():
            at = pairs.spans[name][chosen].to(walker.device)
            z = run.z[:, rows, at]
            made.entering[:, part] = run.residual[:-1, rows, at]
            for layer in range(layers):
                made.attention[layer, part] = walker.attention_output(layer, z[layer])
            made.changes[:, part] = z
        if seen is not None:
            seen(False, chosen, run)
        del run
        if not names and seen is None:
            continue
        run = walker.run(pairs.corrupt_ids[chosen].to(walker.device), keep=["residual", *outputs])
        for name, made in chains.items():
            at = pairs.corrupt_spans[name][chosen].to(walker.device)
            made.changes[:, part] = run.z[:, rows, at] - made.changes[:, part]
        if seen is not None:
            seen(True, chosen, run)
        del run
    return chains, kept
