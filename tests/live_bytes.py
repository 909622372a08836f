"""How much memory tensors take at once: every storage that an operation makes is followed until it is gone."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        peak: most bytes that were alive at once, of tensors made inside.
    """

    def __init__(self, *known: Tensor) -> None:
        """`known` tensors are not counted, nor are views of them."""
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = 0  # of all in _live, some of which may be gone: no less than what is alive

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor):
                self._follow(made)
        if self._total > self.peak:
            self._live = {at: held for at, held in self._live.items() if not held[0].expired()}
            self._total = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._total)
        return result

    def leave_out(self, *tensors: Tensor) -> None:
        """These are not counted any more, such as results."""
        for tensor in tensors:
            at = tensor.untyped_storage().data_ptr()
            self._known.add(at)
            self._total -= self._live.pop(at, (None, 0))[1]

    def _follow(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        at = storage.data_ptr()
        if at in self._known or (at in self._live and not self._live[at][0].expired()):
            return
        self._total += storage.nbytes() - self._live.get(at, (None, 0))[1]
        self._live[at] = StorageWeakRef(storage), storage.nbytes()
