"""Trace and TraceDict: what code written for baukit relies on, on whatever backend is there, and on ours."""

import pytest
import torch
from torch import nn

from stages.circuits import trace
from stages.circuits.trace import HookTrace, HookTraceDict, untuple
from stages.pipeline.stage import Invalid
from tests.oracles import FAMILIES, blocks, random_model

BACKENDS = [
    pytest.param(trace.Trace, trace.TraceDict, id="in use"),
    pytest.param(HookTrace, HookTraceDict, id="ours"),
]


class Model(nn.Module):
    """Three named layers; the last returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.inner = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.calls: list[str] = []

    def forward(self, x):
        x = self.inner(self.first(x))
        self.calls.append("end")
        return x, x * 2


@pytest.fixture
def model() -> Model:
    return Model()


X = torch.tensor([[1.0, -2.0, 3.0]])


@pytest.mark.parametrize("one, many", BACKENDS)
def test_retains_and_leaves_no_hook(model, one, many):
    expected = model(X)
    with one(model, "inner.1", retain_input=True) as traced:
        model(X)
    assert torch.equal(traced.output, expected[0])
    assert torch.equal(traced.input, model.first(X).relu())
    with many(model, ["first", "inner.1", "first"], retain_input=True) as traced:
        model(X)
    assert list(traced) == ["first", "inner.1"] and torch.equal(traced["first"].input, X)
    assert torch.equal(traced["inner.1"].output, expected[0])
    with one(model) as traced:  # the module itself
        model(X)
    assert isinstance(traced.output, tuple) and torch.equal(traced.output[1], expected[1])
    assert not model.first._forward_hooks and not model.inner[1]._forward_hooks and not model._forward_hooks


@pytest.mark.parametrize("one, many", BACKENDS)
def test_clone_and_detach(model, one, many):
    with one(model, "first") as shared:
        model(X)
    with one(model, "first", clone=True, detach=True) as cloned:
        model(X)
    assert (shared.output >= 0).all()  # the ReLU in place went over it
    assert torch.equal(cloned.output, nn.functional.linear(X, model.first.weight, model.first.bias))
    assert (cloned.output < 0).any() and not cloned.output.requires_grad and shared.output.requires_grad


@pytest.mark.parametrize("one, many", BACKENDS)
def test_retain_grad(model, one, many):
    with one(model, "first", retain_grad=True) as traced:
        model(X)[0].sum().backward()
    hidden = nn.functional.linear(X, model.first.weight, model.first.bias)
    assert torch.allclose(traced.output, hidden)
    assert torch.allclose(traced.output.grad, model.inner[1].weight.sum(0) * (hidden > 0))


@pytest.mark.parametrize("one, many", BACKENDS)
def test_edit_output(model, one, many):
    expected = nn.functional.linear(torch.ones(1, 4), model.inner[1].weight, model.inner[1].bias)
    for edit in (
        lambda output: torch.ones_like(output),
        lambda output, layer: torch.ones_like(output) if layer == "inner.0" else output,
        lambda inputs, layer, output: torch.ones_like(inputs) if layer == "inner.0" else output,
        lambda x: torch.ones_like(x),
    ):
        with one(model, "inner.0", edit_output=edit) as traced:
            assert torch.allclose(model(X)[0], expected)
        assert torch.equal(traced.output, torch.ones(1, 4))
    with many(model, ["first", "inner.1"], edit_output=lambda output, layer: output * (layer == "inner.1")):
        assert torch.allclose(model(X)[0], model.inner[1].bias[None])


@pytest.mark.parametrize("one, many", BACKENDS)
def test_stop_ends_the_forward_pass(model, one, many):
    with one(model, "first", stop=True) as traced:
        model(X)
        raise AssertionError("the forward pass was to end")
    assert traced.output.shape == (1, 4) and model.calls == []
    with many(model, ["first", "inner.0"], stop=True) as traced:
        model(X)
    assert traced["inner.0"].output.shape == (1, 4) and model.calls == []


@pytest.mark.parametrize("one, many", BACKENDS)
def test_other_exceptions_pass_and_hooks_go(model, one, many):
    for context in (one(model, "first", stop=True), many(model, ["first", "inner.1"], stop=True)):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
    assert not model.first._forward_hooks and not model.inner[1]._forward_hooks


@pytest.mark.parametrize("one, many", BACKENDS)
def test_an_unknown_layer_is_a_lookup_error(model, one, many):
    for make in (lambda: one(model, "second"), lambda: many(model, ["first", "second"])):
        with pytest.raises(LookupError):
            make()


def test_stop_without_a_stop_is_no_error(model):
    # baukit's __exit__ asks issubclass(None, ...) here
    with HookTrace(model, "inner.1", stop=True):
        model.first(X)
    with HookTraceDict(model, ["first", "inner.1"], stop=True) as traced:
        model.first(X)
    assert traced["first"].output.shape == (1, 4)


def test_names_left_by_a_failed_trace_dict(model):
    with pytest.raises(LookupError, match="no submodule 'second'"):
        HookTraceDict(model, ["first", "second"])
    assert not model.first._forward_hooks


def test_backend_says_what_is_in_use():
    assert trace.BACKEND in ("baukit", "stages.circuits.trace")
    assert (trace.Trace is HookTrace) == (trace.BACKEND == "stages.circuits.trace")


def through_the_tuple(output):
    output[0][:, 3] = 1.0
    return output


def through_a_loop(output):
    hidden, *_ = output
    return hidden


def an_example(output):
    output[0] = 1.0
    return output


def one_example(output):
    output[0, :] = 1.0
    return output


def untupled(output):
    untuple(output)[:, 3] = 1.0
    return output


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_edits_written_for_tuples_of_layers_are_refused_and_untuple_edits_every_example(kind):
    model = random_model(kind)
    layer, ids = blocks(model)[1], torch.arange(12).view(2, 6)
    for edit in (through_the_tuple, through_a_loop, an_example):
        with pytest.raises(Invalid, match=r"output\[0\] of a layer that gives a tensor of shape \[2, 6, 32\]"):
            with HookTrace(model, layer, edit_output=edit):
                model(input_ids=ids)
    plain = model(input_ids=ids).logits
    with HookTrace(model, layer) as before:
        model(input_ids=ids)
    for edit in (untupled, lambda output: output.index_fill(1, torch.tensor([3]), 1.0)):
        with HookTrace(model, layer, edit_output=edit) as traced:
            edited = model(input_ids=ids).logits
        assert type(traced.output) is torch.Tensor
        assert (traced.output[:, 3] == 1.0).all()
        assert torch.equal(traced.output[:, :3], before.output[:, :3])
        assert ((edited - plain).abs().amax((1, 2)) > 1e-3).all(), "every example changes"
    with HookTrace(model, layer, edit_output=one_example) as traced:
        edited = model(input_ids=ids).logits
    assert (traced.output[0] == 1.0).all() and torch.equal(traced.output[1], before.output[1])


def test_untuple_is_the_hidden_states_of_either_version():
    hidden = torch.zeros(2, 3, 4)
    for output in (hidden, (hidden, "weights")):
        assert untuple(output) is hidden
