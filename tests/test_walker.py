"""The walker against the Hugging Face model it walks over."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from stages.circuits.trace import TraceDict
from stages.circuits.walker import Walker, Window
from stages.pipeline.stage import Invalid
from tests.oracles import (
    FAMILIES,
    blocks,
    float64_softmax,
    head_outputs,
    hooked_logits,
    random_model,
    random_pairs,
    walker_of,
)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_run_equals_hugging_face(kind):
    model = random_model(kind)
    walker, ids = walker_of(model), random_pairs().clean_ids
    run = walker.run(ids)
    z = torch.stack(head_outputs(model, ids))
    with float64_softmax():
        output = model(ids, use_cache=False, output_hidden_states=True)
    errors = {
        "logits": run.logits - output.logits[:, -1],
        "z": run.z.flatten(-2) - z,
        "residual": run.residual[:-1] - torch.stack(output.hidden_states[:-1]),
        "layers": torch.stack(
            [walker.after_attention(at, run.residual[at], walker.attention_output(at, run.z[at])) for at in range(3)]
        )
        - run.residual[1:],
    }
    worst = {name: float(error.abs().max()) for name, error in errors.items()}
    print(kind, worst)
    assert max(worst.values()) <= 1e-11


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_tail_equals_a_whole_run_with_other_last_tokens(kind):
    pairs = random_pairs()
    walker = walker_of(random_model(kind))
    for start in (0, 4, 10):
        ids = torch.cat([pairs.clean_ids[:, :start], pairs.corrupt_ids[:, start:]], dim=1)
        whole, clean = walker.run(ids), walker.run(pairs.clean_ids)
        residual = torch.stack([clean.residual[0][:, start:], whole.residual[0][:, start:]], dim=1)
        window = Window.tail(len(ids), start, ids.shape[1], torch.float64)
        logits = walker.continue_from(clean, window, residual, 0)
        error = float((logits - torch.stack([clean.logits, whole.logits], dim=1)).abs().max())
        print(kind, start, error)
        assert error <= 1e-11


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_positions_outside_a_scattered_window_stay_as_they_were(kind):
    model, pairs = random_model(kind), random_pairs()
    walker = walker_of(model)
    clean, changed = walker.run(pairs.clean_ids), walker.run(pairs.corrupt_ids)
    rows = torch.arange(5)
    early = pairs.positions["earlier"]
    padded = torch.stack([early, early, early + 3, torch.full((5,), 10)], dim=1)
    live = torch.tensor([True, False, True, True]).expand(5, 4)
    residual = clean.residual[0][rows[:, None], padded].clone()
    residual[:, [0, 2]] = changed.residual[0][rows[:, None], padded[:, [0, 2]]]
    window = Window.scattered(padded, 11, live, torch.float64)
    logits = walker.continue_from(clean, window, residual[:, None], 0)[:, 0]

    inside = torch.zeros(5, 11, dtype=torch.bool)
    inside[rows[:, None], padded] = True

    def restore(output, layer):
        at = names.index(layer)
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(inside[..., None], hidden, clean.residual[at + 1])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def embed(output):
        output = output.clone()
        output[rows[:, None], padded[:, [0, 2, 3]]] = residual[:, [0, 2, 3]]
        return output

    names = blocks(model)
    entry = {"gpt_neox": "gpt_neox.emb_dropout", "gpt2": "transformer.drop"}.get(
        model.config.model_type, "model.embed_tokens"
    )
    with TraceDict(model, names, edit_output=restore):
        expected = hooked_logits(model, pairs.clean_ids, edits={entry: embed})
    error = float((logits - expected).abs().max())
    print(kind, error, float((expected - clean.logits).abs().max()))
    assert float((expected - clean.logits).abs().max()) > 1e-2
    assert error <= 1e-11


def test_other_architectures_are_refused():
    config = OPTConfig(vocab_size=9, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(Invalid, match="model type 'opt' is not supported: must be one of llama, .*, gpt2"):
        Walker(OPTForCausalLM(config))


def test_a_model_that_computes_something_else_is_refused():
    model = random_model("llama")
    with TraceDict(model, ["model.layers.1.mlp"], edit_output=lambda output: output * 1.5):
        Walker(model)  # the walker calls the same module, so it sees the edit too
    block = model.model.layers[1]
    block.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(Invalid, match="does not reproduce this model"):
        walker_of(model)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_the_fused_attention_equals_the_plain_one(kind, monkeypatch):
    walker = walker_of(random_model(kind))
    ids = random_pairs().clean_ids[:3]
    length = ids.shape[1]
    found = []
    for slots in (1, 100):
        monkeypatch.setattr("stages.circuits.attention.FUSED_SLOTS", slots)
        run = walker.run(ids)
        start = 5
        tail = run.residual[1][:, None, start:].repeat(1, 2, 1, 1) * torch.tensor([1.0, 1.1])[:, None, None]
        window = Window.tail(len(ids), start, length, walker.dtype)
        found.append((run.logits, run.z, walker.continue_from(run, window, tail, 1), walker.head_outputs(ids, 2)))
    for ours, other in zip(*found, strict=True):
        assert float((ours - other).abs().max()) <= 1e-11
    assert torch.equal(found[0][3], found[0][1][:2]), "the first layers are those of a whole run"
