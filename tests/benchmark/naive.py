"""The paper's path patching with hooks, as lean as it can be written.

For every sender, whatever its layer:

1. a clean pass in which every head output is overwritten by its clean value and the sender's, at its position, by its
   corrupt value; the receivers' q or v is read off;
2. a clean pass in which the receivers' q or v is written.

With the logits as receiver the first pass is all. Batched over examples, no loop but that over senders, nothing cloned
but the recorded values, no language-model head where it is not read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.circuit import Component
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import Measure, Receivers


class NaivePathPatcher:
    """Same arguments and results as `PathPatcher`, for single heads."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, pairs: AlignedPairs, measure: Measure) -> None:
        self._model, self._pairs, self._measure = model, pairs, measure
        self._decoder: Any = model.model
        config = model.config
        self._width = config.hidden_size // config.num_attention_heads
        self._group = config.num_attention_heads // config.num_key_value_heads
        self._ids = pairs.clean_ids.to(model.device)
        self._rows = torch.arange(len(self._ids), device=model.device)
        self._every = torch.arange(len(self._ids))
        self._z, logits = self._record(self._ids)
        self.clean = self._measured(logits)
        corrupt = self._record(pairs.corrupt_ids.to(model.device))[0]
        self._corrupt = {  # position -> layer -> n h*a
            name: [z[self._rows, at.to(model.device)] for z in corrupt] for name, at in pairs.corrupt_positions.items()
        }

    @torch.no_grad()
    def head_effects(
        self, position: str, receivers: Receivers, senders: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "e n"]:
        """Effect of each sender at `position` on the receivers, per example."""
        at = self._pairs.positions[position].to(self._model.device)
        columns = self._columns(receivers)
        found = torch.empty(len(senders), len(self._ids), dtype=self.clean.dtype)
        for number, (layer, head) in enumerate(senders):
            mine = slice(head * self._width, (head + 1) * self._width)
            z = self._z[layer]
            kept = z[self._rows, at, mine]
            z[self._rows, at, mine] = self._corrupt[position][layer][:, mine]  # in place, and back below
            logits = self._two_passes(receivers, columns, at)
            z[self._rows, at, mine] = kept
            found[number] = self._measured(logits) - self.clean
        return found

    def _two_passes(self, receivers: Receivers, columns: dict[int, Tensor], at: Tensor) -> Float[Tensor, "n vocab"]:
        read: dict[int, Tensor] = {}
        handles = []
        for layer, block in enumerate(self._decoder.layers):
            handles.append(block.self_attn.o_proj.register_forward_pre_hook(lambda _, __, z=self._z[layer]: (z,)))
        for layer in columns:

            def keep(_: Any, __: Any, output: Tensor, layer: int = layer) -> None:
                read[layer] = output[self._rows, at][:, columns[layer]]

            handles.append(self._projection(layer, receivers).register_forward_hook(keep))
        try:
            if receivers.component is None:
                return self._logits(self._ids)
            self._decoder(input_ids=self._ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        handles = []
        for layer, chosen in columns.items():

            def write(_: Any, __: Any, output: Tensor, layer: int = layer, chosen: Tensor = chosen) -> None:
                output[self._rows[:, None], at[:, None], chosen] = read[layer]

            handles.append(self._projection(layer, receivers).register_forward_hook(write))
        try:
            return self._logits(self._ids)
        finally:
            for handle in handles:
                handle.remove()

    def _projection(self, layer: int, receivers: Receivers) -> Any:
        return getattr(self._decoder.layers[layer].self_attn, f"{receivers.component}_proj")

    def _columns(self, receivers: Receivers) -> dict[int, Tensor]:
        """Layer -> columns of the projection that belong to the receivers."""
        columns: dict[int, Tensor] = {}
        for layer in sorted({layer for layer, _ in receivers.heads}):
            heads = {
                head if receivers.component == Component.Q else head // self._group
                for at, head in receivers.heads
                if at == layer
            }
            first = torch.tensor(sorted(heads)) * self._width
            columns[layer] = (first[:, None] + torch.arange(self._width)).flatten().to(self._model.device)
        return columns

    def _record(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Head outputs of every layer, [n t h*a], and the logits."""
        outputs: list[Tensor] = []
        handles = [
            block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
            for block in self._decoder.layers
        ]
        try:
            logits = self._logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        return outputs, logits

    def _logits(self, ids: Tensor) -> Float[Tensor, "n vocab"]:
        return self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    def _measured(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
        return self._measure(logits[:, None], self._every)[:, 0].cpu()
