"""`Trace` and `TraceDict`: read or edit what modules of a model take and give, for code written for baukit.

With baukit installed its own classes are used; otherwise the ones below, written on PyTorch's forward hooks
with the same interface. `BACKEND` says which ("baukit" or "stages.circuits.trace").

    with Trace(model, "model.layers.3.mlp") as traced:
        model(ids)
    traced.output

    with TraceDict(model, names, edit_output=lambda output, layer: output * 0) as traced:
        model(ids)
    traced["model.layers.3.mlp"].output

Two differences on purpose: leaving a `TraceDict(..., stop=True)` whose last layer never ran is no error here, and the
layers of a decoder are guarded. Before transformers 5 they gave a tuple, hidden states first, and since then the hidden
states themselves: `output[0][:] = x`, written for the tuple, would now edit the first example alone, without a word.
Where a layer gives a tensor, an `edit_output` that takes `output[0]` is refused; `untuple(output)` is the hidden states
in either version, and may be written to in place. (baukit's own classes do not guard.)

The engine does not use these classes.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from stages.pipeline.stage import Invalid


def untuple(output: Any) -> Any:
    """The hidden states in what a layer gives: its first entry if that is a tuple, else all of it."""
    return output[0] if isinstance(output, tuple) else _unguarded(output)


class StopForward(Exception):
    """Ends a forward pass once everything that was asked for has been seen; caught by the context manager."""


class HookTrace:
    """Retains, and may edit, the output of one module while the context is open.

    Args:
        module: the model, or the module itself when `layer` is None.
        layer: dotted name of a submodule.
        retain_output: keep `.output`.
        retain_input: keep `.input`: the first positional argument, all of them as a tuple if there are
            several, or the keyword arguments if there is none.
        clone: keep copies, so that later operations in place do not change what was kept.
        detach: keep tensors cut from the graph.
        retain_grad: keep gradients of the output; the rest of the forward pass then uses a view of it.
        edit_output: called as f(output), f(output, layer), or by keyword for any of output, layer, inputs;
            what it returns replaces the output.
        stop: end the forward pass after this module.

    Raises:
        LookupError: the model has no such submodule.
    """

    output: Any
    input: Any

    def __init__(
        self,
        module: nn.Module,
        layer: str | None = None,
        retain_output: bool = True,
        retain_input: bool = False,
        clone: bool = False,
        detach: bool = False,
        retain_grad: bool = False,
        edit_output: Callable[..., Any] | None = None,
        stop: bool = False,
    ) -> None:
        self.layer = layer
        self.stop = stop

        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            inputs = (arguments[0] if len(arguments) == 1 else arguments) if arguments else keywords
            if retain_input:
                self.input = _copy(inputs, clone, detach, False)
            if edit_output is not None:
                given = output.as_subclass(_HiddenStates) if guarded and type(output) is Tensor else output
                output = _unguarded(_call_edit(edit_output, given, layer, inputs))
            if retain_output:
                self.output = _copy(output, clone, detach, retain_grad)
                if retain_grad:  # operations in place must not touch the tensor whose gradient is retained
                    output = _copy(self.output, True, False, False)
            if stop:
                raise StopForward
            return output

        traced = _submodule(module, layer)
        guarded = isinstance(traced, GradientCheckpointingLayer)
        self._handle = traced.register_forward_hook(hook, with_kwargs=True)

    def __enter__(self) -> "HookTrace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.close()
        return self.stop and kind is not None and issubclass(kind, StopForward)

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()


class HookTraceDict(OrderedDict):
    """One trace for each of several layers, by layer name; the arguments are those of `HookTrace`.

    Args:
        layers: names of submodules; repeated names count once. With `stop`, the forward pass ends after the
            last one in this order, so name them in the order in which they run.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[str | None] | None = None,
        retain_output: bool = True,
        retain_input: bool = False,
        clone: bool = False,
        detach: bool = False,
        retain_grad: bool = False,
        edit_output: Callable[..., Any] | None = None,
        stop: bool = False,
    ) -> None:
        super().__init__()
        self.stop = stop
        names = list(dict.fromkeys(layers if layers is not None else [None]))
        try:
            for name in names:
                self[name] = HookTrace(
                    module,
                    name,
                    retain_output=retain_output,
                    retain_input=retain_input,
                    clone=clone,
                    detach=detach,
                    retain_grad=retain_grad,
                    edit_output=edit_output,
                    stop=stop and name == names[-1],
                )
        except LookupError:
            self.close()
            raise

    def __enter__(self) -> "HookTraceDict":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.close()
        return self.stop and kind is not None and issubclass(kind, StopForward)

    def close(self) -> None:
        """Remove all hooks."""
        for trace in reversed(self.values()):
            trace.close()


class _HiddenStates(Tensor):
    """What a decoder's layer gives, while an edit looks at it: the same storage, but not to be taken for a tuple."""

    # what is computed from it is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def __getitem__(self, index: Any) -> Any:
        self._refuse(index)
        return super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse(index)
        super().__setitem__(index, value)

    def __iter__(self) -> Any:
        self._refuse(0)

    def _refuse(self, index: Any) -> None:
        if isinstance(index, int):
            raise Invalid(
                f"edit_output takes output[{index}] of a layer that gives a tensor of shape {list(self.shape)}, where "
                f"this is example {index} and not the hidden states: write untuple(output), or output[{index}, :] for "
                "the example"
            )


def _unguarded(output: Any) -> Any:
    if isinstance(output, tuple | list):
        return type(output)(_unguarded(entry) for entry in output) if type(output) in (tuple, list) else output
    return output.as_subclass(Tensor) if isinstance(output, _HiddenStates) else output


def _submodule(module: nn.Module, layer: str | None) -> nn.Module:
    if layer is None:
        return module
    try:
        return module.get_submodule(layer)
    except AttributeError:
        raise LookupError(f"the model has no submodule '{layer}'") from None


def _copy(x: Any, clone: bool, detach: bool, retain_grad: bool) -> Any:
    """Apply the retain options to a tensor, or to every tensor of nested tuples, lists and dicts."""
    if isinstance(x, Tensor):
        if retain_grad:
            if not x.requires_grad:
                x.requires_grad_()
            x.retain_grad()
        elif detach:
            x = x.detach()
        return x.clone() if clone else x
    if isinstance(x, dict):
        return type(x)({key: _copy(value, clone, detach, retain_grad) for key, value in x.items()})
    if isinstance(x, list | tuple):
        return type(x)([_copy(value, clone, detach, retain_grad) for value in x])
    return x


def _call_edit(edit: Callable[..., Any], output: Any, layer: str | None, inputs: Any) -> Any:
    """Call with what the function takes: by name where it names them, else output (and layer) by position."""
    offered = {"output": output, "layer": layer, "inputs": inputs}
    parameters = inspect.signature(edit).parameters.values()
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return edit(**offered)
    named = [p.name for p in parameters if p.kind != inspect.Parameter.VAR_POSITIONAL]
    if named and set(named) <= set(offered):
        return edit(**{name: offered[name] for name in named})
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is inspect.Parameter.empty]
    takes_layer = len(required) > 1 or any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return edit(output, layer) if takes_layer else edit(output)


def _backend() -> tuple[str, Any, Any]:
    try:
        import baukit  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "stages.circuits.trace", HookTrace, HookTraceDict
    return "baukit", baukit.Trace, baukit.TraceDict


BACKEND, Trace, TraceDict = _backend()
