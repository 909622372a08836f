"""Attention knockout against whole hooked passes of the Hugging Face model."""

import pytest
import torch
from torch import Tensor

from stages.circuits.knockout import knocked_out, layer_windows
from stages.pipeline.stage import Invalid
from tests.oracles import FAMILIES, random_model, walker_of
from tests.oracles_ablation import naive_knockout, random_positions, random_prompts

IDS, AT = random_prompts(), random_positions()
WINDOWS = [range(0), range(1), range(1, 2), range(2, 3), range(2), range(1, 3), range(3)]
MEMORY = 64.0


def keys_before(query: Tensor) -> Tensor:
    """Two keys for each example: one at random before the query, one right before it."""
    draw = torch.rand(len(query), generator=torch.Generator().manual_seed(3))
    return torch.stack([(draw * query).long(), query - 1], dim=1)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["last", "query_label", "earlier_separator"])
def test_knockout_equals_whole_hooked_passes(kind: str, name: str) -> None:
    model = random_model(kind)
    walker = walker_of(model)
    clean, query = walker.run(IDS), AT[name]
    keys = keys_before(query)
    ours = knocked_out(walker, clean, query, keys, WINDOWS, MEMORY)
    for variant, window in enumerate(WINDOWS):
        naive = naive_knockout(model, IDS, query, keys, window)
        error = float((ours[:, variant] - naive).abs().max())
        effect = float((clean.logits.detach() - naive).abs().max())
        print(f"{kind}, {name}, layers {list(window)}: max error {error:.1e}, effect {effect:.1e}")
        assert error <= 1e-9
        if window == range(0):
            assert effect <= 1e-9
        elif name == "last" or window != range(2, 3):
            assert effect > 1e-4, "the knockout must do something"
    little = knocked_out(walker, clean, query, keys, WINDOWS, 1e-6)
    assert float((ours - little).abs().max()) <= 1e-12, "memory changes nothing"


def test_only_the_last_position_matters_in_the_last_layer() -> None:
    walker = walker_of(random_model("llama"))
    clean = walker.run(IDS)
    query = torch.full((len(IDS),), IDS.shape[1] - 3)
    found = knocked_out(walker, clean, query, query[:, None] - 1, [range(2, 3)], MEMORY)[:, 0]
    assert float((found - clean.logits.detach()).abs().max()) <= 1e-12


def test_windows_are_centred_and_cut_off() -> None:
    assert [list(window) for window in layer_windows(4, 3)] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert [list(window) for window in layer_windows(3, 1)] == [[0], [1], [2]]
    assert [list(window) for window in layer_windows(3, 2)] == [[0], [0, 1], [1, 2]]
    with pytest.raises(Invalid, match="0 layers"):
        layer_windows(3, 0)


def test_bad_input_is_refused() -> None:
    walker = walker_of(random_model("llama"))
    clean, query = walker.run(IDS), AT["last"]
    with pytest.raises(Invalid, match="before its query"):
        knocked_out(walker, clean, query, query[:, None], [range(1)], MEMORY)
    with pytest.raises(Invalid, match="before its query"):
        knocked_out(walker, clean, query, query[:, None] * 0 - 1, [range(1)], MEMORY)
    with pytest.raises(Invalid, match="layer 3"):
        knocked_out(walker, clean, query, query[:, None] - 1, [[3]], MEMORY)
