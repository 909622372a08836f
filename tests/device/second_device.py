"""A second device that any machine has: its tensors say `elsewhere`, and refuse to meet those of the CPU.

Inside `second_device()` whatever is made on or moved to `elsewhere` is an `Elsewhere`: a tensor with a twin on the CPU,
on which every operation is done. Operations that mix both devices are refused where CUDA refuses them, and such a
tensor cannot become a numpy array. So code that runs through has no tensor on the wrong side, and its results are the
CPU's, bit for bit, as long as it asks for the same operations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere:0")
# operations that take an index, or a scalar as a tensor of no dimension, from the CPU
INDEXING = ("aten::index.", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")
JOINING = ("aten::cat", "aten::stack")


class Elsewhere(Tensor):
    """A tensor on the second device; `twin` holds its numbers."""

    twin: Tensor

    @staticmethod
    def __new__(cls, twin: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls,
            twin.size(),
            strides=twin.stride(),
            storage_offset=twin.storage_offset(),
            dtype=twin.dtype,
            layout=twin.layout,
            device=DEVICE,
            requires_grad=twin.requires_grad,
        )
        made.twin = twin
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return _run(operation, arguments, keywords or {})

    def tolist(self) -> Any:
        return self.twin.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert elsewhere:0 device type tensor to numpy: use Tensor.cpu() first")

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Elsewhere({self.twin!r})"


class _Factories(TorchDispatchMode):
    """What is made on the second device, or moved there from the CPU."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        with self:  # in inference mode torch does not take operations like `to` apart itself
            found = operation.decompose(*arguments, **(keywords or {}))
        return _run(operation, arguments, keywords or {}) if found is NotImplemented else found


def _run(operation: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
    inputs = [x for x in tree_flatten((arguments, keywords))[0] if isinstance(x, Tensor)]
    there = [x for x in inputs if isinstance(x, Elsewhere)]
    name = str(operation.name())
    asked = keywords.get("device")
    if name.startswith("aten::_to_copy") or not inputs or "like" in name or "new_" in name:
        goes = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    else:
        goes = bool(there)
        _refuse_mixing(name, arguments, inputs)
    if name.startswith("aten::copy_"):  # from any device to any
        goes = isinstance(arguments[0], Elsewhere)
    if keywords.get("device") is not None:
        keywords = keywords | {"device": torch.device("cpu")}
    if isinstance(keywords.get("generator"), torch.Generator) and goes:
        raise RuntimeError("Expected an 'elsewhere' device type for generator but found 'cpu'")
    plain, keywords = tree_map(_twin, (arguments, keywords))
    found = operation(*plain, **keywords)
    own = {id(x.twin): x for x in there}  # operations in place give back what they were given
    return tree_map(lambda x: own.get(id(x), Elsewhere(x)) if isinstance(x, Tensor) and goes else x, found)


def _refuse_mixing(name: str, arguments: Any, inputs: list[Tensor]) -> None:
    if name.startswith("aten::copy_"):
        return
    if name.startswith(INDEXING):
        indexed, indices = arguments[0], [x for x in arguments[1] if x is not None]
        if not isinstance(indexed, Elsewhere) and any(isinstance(x, Elsewhere) for x in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        inputs = [indexed, *(x for x in arguments[2:] if isinstance(x, Tensor))]
    if not name.startswith(JOINING):
        inputs = [x for x in inputs if isinstance(x, Elsewhere) or x.dim() > 0]
    if len({isinstance(x, Elsewhere) for x in inputs}) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found elsewhere:0 and cpu")


def _twin(x: Any) -> Any:
    return x.twin if isinstance(x, Elsewhere) else x


@contextmanager
def second_device() -> Iterator[str]:
    """Gives the name of the device."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) moves in the mode's sight
    try:
        with _Factories():
            yield str(DEVICE)  # with its index, which torch would look up otherwise
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
