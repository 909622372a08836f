"""The last layer at the last tokens alone against the whole layer: logits and gradients."""

import pytest
import torch

from stages.learning.last_layer import last_layer_at_the_end
from tests.oracles import random_model

KINDS = ("llama", "llama_gqa", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_logits_and_gradients_at_the_end_are_the_same(kind: str, tokens: int) -> None:
    model = random_model(kind)
    model.set_attn_implementation("sdpa")  # eager attention rounds to float32 in between
    ids = torch.randint(20, (5, 13), generator=torch.Generator().manual_seed(0))
    found = []
    for restricted in (False, True):
        model.zero_grad()
        if restricted:
            with last_layer_at_the_end(model, tokens):
                logits = model(input_ids=ids).logits[:, -tokens:]
        else:
            logits = model(input_ids=ids).logits[:, -tokens:]
        logits.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients))
    (whole, expected), (end, ours) = found
    errors = [float((whole - end).abs().max()), *(float((expected[n] - ours[n]).abs().max()) for n in expected)]
    print(f"{kind}, {tokens} tokens: max error {max(errors):.1e}")
    assert set(expected) == set(ours)
    assert max(errors) <= 1e-9


def test_less_is_computed_inside_and_nothing_changes_after() -> None:
    model = random_model("llama")
    ids = torch.randint(20, (2, 13), generator=torch.Generator().manual_seed(0))
    shapes = []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    before = model(input_ids=ids).logits
    with pytest.raises(KeyboardInterrupt), last_layer_at_the_end(model, 2):
        inside = model(input_ids=ids).logits
        raise KeyboardInterrupt
    after = model(input_ids=ids).logits
    assert shapes == [13, 2, 13]
    assert torch.equal(before, after) and not torch.equal(before[:, 0], inside[:, 0])
