"""The walker against the Hugging Face model it walks over."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from stages.circuits.trace import TraceDict
from stages.circuits.walker import KEPT, Walker, Window
from stages.pipeline.stage import Invalid
from tests.live_bytes import LiveBytes
from tests.oracles import (
    FAMILIES,
    LENGTH,
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
    for start in (0, 4, 10, LENGTH - 1):
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
    padded = torch.stack([early, early, early + 3, torch.full((5,), LENGTH - 1)], dim=1)
    live = torch.tensor([True, False, True, True]).expand(5, 4)
    residual = clean.residual[0][rows[:, None], padded].clone()
    residual[:, [0, 2]] = changed.residual[0][rows[:, None], padded[:, [0, 2]]]
    window = Window.scattered(padded, LENGTH, live, torch.float64)
    logits = walker.continue_from(clean, window, residual[:, None], 0)[:, 0]

    inside = torch.zeros(5, LENGTH, dtype=torch.bool)
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
    entries = {
        "gpt_neox": "gpt_neox.emb_dropout",
        "gpt2": "transformer.drop",
        "gemma3": "model.language_model.embed_tokens",
    }
    entry = entries.get(model.config.model_type, "model.embed_tokens")
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


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_run_keeps_what_it_is_asked_for_and_no_graph(kind):
    walker = walker_of(random_model(kind))
    ids = random_pairs().clean_ids
    whole = walker.run(ids)
    assert not any(getattr(whole, name).requires_grad for name in (*KEPT, "logits"))
    assert not walker.head_outputs(ids, 2).requires_grad
    n, length, layers = *ids.shape, walker.n_layers
    assert whole.residual.shape == (layers + 1, n, length, walker.width)
    assert whole.z.shape == (layers, n, length, walker.n_heads, walker.head_dim)
    assert whole.keys.shape == whole.values.shape == (layers, n, walker.n_kv_heads, length, walker.head_dim)
    for keep in ((), ("z",), ("residual", "keys"), ("values",)):
        run = walker.run(ids, keep=keep)
        assert torch.equal(run.logits, whole.logits)
        for name in KEPT:
            kept = getattr(run, name)
            assert torch.equal(kept, getattr(whole, name)) if name in keep else kept.numel() == 0
        some = run.select(torch.tensor([3, 1]))
        assert torch.equal(some.logits, whole.logits[[3, 1]])
        assert torch.equal(some.z, whole.z[:, [3, 1]]) or "z" not in keep
    with pytest.raises(Invalid, match="keep holds 'attention': must be some of residual, z, keys, values"):
        walker.run(ids, keep=("z", "attention"))


def test_a_run_takes_no_more_memory_than_what_it_keeps_and_a_few_layers():
    """Live bytes at the peak, on the same model with ever more layers."""
    ids, grown = random_pairs(n=4, length=24).clean_ids, {}
    for n_layers in (4, 12):
        walker = walker_of(random_model("llama", n_layers))
        for keep in ((), ("z",), KEPT):
            with LiveBytes() as live:
                live.leave_out(*walker.model.parameters(), *walker.model.buffers(), ids)
                run = walker.run(ids, keep=keep)
            grown[n_layers, len(keep)] = live.peak
            kept = sum(getattr(run, name).nbytes for name in KEPT)
            print(n_layers, keep, live.peak, kept)
            assert live.peak - kept <= 400_000, "what one layer and the logits need"
    layer = 4 * 24 * 32 * 8
    assert grown[12, 0] == grown[4, 0]
    assert grown[12, 1] - grown[4, 1] == 8 * layer
    assert grown[12, 4] - grown[4, 4] == 4 * 8 * layer  # the residual stream, z, keys and values, each of width 32


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_everything_is_made_on_the_device_of_the_model(kind):
    """Where a device is left out it is "meta" here, and no number comes back from there."""
    model, pairs = random_model(kind), random_pairs()
    ids, expected = pairs.clean_ids, walker_of(model).run(pairs.clean_ids)
    with torch.device("meta"):
        walker = walker_of(model)
        run = walker.run(ids)
        z = walker.head_outputs(ids, 2)
        tail = Window.tail(len(ids), 5, LENGTH, walker.dtype, walker.device)
        logits = walker.continue_from(run, tail, run.residual[1][:, None, 5:], 1)[:, 0]
        slots = torch.stack([pairs.positions["earlier"], pairs.positions["last"]], 1)
        scattered = Window.scattered(slots, LENGTH, dtype=walker.dtype)
        rows = torch.arange(len(ids), device="cpu")[:, None]
        alone = walker.continue_from(run, scattered, run.residual[1][rows, slots][:, None], 1)[:, 0]
    for ours, wanted in ((run.z, expected.z), (z, expected.z[:2]), (logits, expected.logits), (alone, expected.logits)):
        assert float((ours - wanted).abs().max()) <= 1e-12


PAD, BEGIN = 2, 1
PADDED = {
    "none": ([5, 6, 7, 8], False),
    "left, one": ([2, 6, 7, 8], True),
    "left, more": ([2, 2, 2, 8], True),
    "right, one": ([5, 6, 7, 2], True),
    "right, more": ([5, 6, 2, 2], True),
    "inside": ([5, 2, 2, 8], False),
    "a beginning": ([1, 6, 7, 8], False),
    "after a beginning": ([1, 2, 7, 8], False),
    "nothing else": ([2, 2, 2, 2], True),
}


@pytest.mark.parametrize("case", PADDED)
def test_padding_at_either_end_is_refused(case):
    """Padding is the end of a text too, as with SmolLM2."""
    model = random_model("llama")
    walker = walker_of(model)
    prompt, padded = PADDED[case]
    ids = torch.tensor([[5, 6, 7, 8], prompt])

    def refused(pad=None, begin=None, end=None):
        model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id = pad, begin, end
        try:
            walker.check_prompts(ids, "clean_ids")
        except Invalid as error:
            assert "clean_ids: prompt 1 starts or ends with the padding token 2: pass prompts without" in str(error)
            return True
        return False

    assert refused(PAD, BEGIN, 9) == padded
    assert refused(PAD, BEGIN, PAD) == padded
    assert refused(PAD, BEGIN, [9, PAD]) == padded, "a list of ends hides nothing"
    assert refused(PAD, PAD, PAD) == (padded and case != "left, one"), "one of it begins a text"
    several = case in ("left, more", "right, more", "nothing else")
    assert refused(None, BEGIN, [PAD, 9]) == several, "without padding, two ends of a text are"
    assert refused(None, PAD, PAD) == several
    assert not refused(None, None, None) and not refused(-1, BEGIN, None)
    model.config.pad_token_id, model.config.eos_token_id = PAD, PAD
    walker.pad = None  # the caller says that no token is padding
    walker.check_prompts(ids)
    walker.pad = 8
    with pytest.raises(Invalid, match="input_ids: prompt 0 starts or ends with the padding token 8"):
        walker.check_prompts(ids)


@torch.no_grad()
def test_left_padding_would_change_the_logits():
    """What the refusal is for: without it the padding would be attended to, and counted in positions."""
    walker, ids = walker_of(random_model("llama")), random_pairs().clean_ids
    padded = torch.cat([torch.full((5, 3), PAD), ids], dim=1)
    assert float((walker.run(padded).logits - walker.run(ids).logits).abs().max()) > 0.1
