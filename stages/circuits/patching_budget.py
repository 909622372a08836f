"""How a memory limit is shared out in path patching, and what its parts take.

Kept between calls, each up to its share: what chains need at every named position (little), clean runs for tails, and
the sweeps of all single heads. One pass is at work at a time. What then remains is for the sweep of a part of the
examples. Several patchers may share one limit.
"""

from collections.abc import Iterable

from stages.circuits.budget import MIB, making_bytes
from stages.circuits.sweep import Receivers
from stages.circuits.walker import Walker

# On a processor, passes are cut so that the tensors of a layer stay near its cache; larger parts are slower.
CACHE_MIB = 64

# Shares of the memory limit: a pass at work, and what is kept of chains, of runs, and of all together.
PASS = 0.2
SHARES = {"chains": 0.3, "runs": 0.2, "sweeps": 0.6}
KEPT = 0.6

# The part of what remains that is for tails, beside the sweep that they belong to.
TAILS = 0.5


class Budget:
    """A memory limit and what is kept within it.

    Args:
        memory_mib: the limit.
    """

    def __init__(self, memory_mib: float | int) -> None:
        self.limit = memory_mib * MIB
        self._kept = dict.fromkeys(SHARES, 0.0)

    def keep(self, what: str, size: float | int) -> bool:
        """Take so many bytes for something to keep, if the shares of its kind and of all allow it; negative to give
        back."""
        if size > 0 and (
            self._kept[what] + size > SHARES[what] * self.limit or sum(self._kept.values()) + size > KEPT * self.limit
        ):
            return False
        self._kept[what] += size
        return True

    def left(self, working: float | int) -> float:
        """Bytes for the sweep of a part of the examples beside what is kept and what the work of a pass takes."""
        return self.limit - max(working, PASS * self.limit) - sum(self._kept.values())


class Sizes:
    """Bytes that the parts of path patching take, each an upper estimate of what is alive at once.

    Args:
        walker: the model.
        length: tokens of the clean prompts.
        longest: tokens of the longer ones of clean and corrupt prompts.
        tokens: how many tokens' logits the measure reads; None: all.
    """

    def __init__(self, walker: Walker, length: int, longest: int, tokens: int | None) -> None:
        self._walker, self._length, self._longest, self._tokens = walker, length, longest, tokens
        self._heads = walker.n_heads * walker.head_dim
        self._kv = 2 * walker.n_kv_heads * walker.head_dim  # keys and values
        self._working_itemsize = max(walker.dtype.itemsize, 4)  # norms and softmax compute in at least float32

    def chain(self) -> int:
        """What is kept of one token of one example."""
        return self._walker.n_layers * (2 * self._walker.width + self._heads) * self._walker.dtype.itemsize

    def runs(self, start: int, reach: int) -> int:
        """The clean run of one example: its residual stream from `start` on, its keys and values before `reach`."""
        walker = self._walker
        numbers = (walker.n_layers + 1) * (self._length - start) * walker.width + walker.n_layers * reach * self._kv
        return numbers * walker.dtype.itemsize

    def making(self) -> int:
        """A clean or corrupt run of one example while it is made, with what is read from it."""
        return making_bytes(self._walker, self._longest) + self.logits(whole=True)

    def tail_copies(self, start: int) -> int:
        """What the passes of one example's tails copy: the prefix, and the stream that enters a layer."""
        walker = self._walker
        numbers = walker.n_layers * start * self._kv + (self._length - start) * walker.width
        return numbers * walker.dtype.itemsize

    def stream(self, depths: int, tokens: int) -> int:
        """Streams of one set of senders at k tokens on their way, with those that are kept for receivers."""
        return (depths + 3) * tokens * self._walker.width * self._walker.dtype.itemsize

    def sweep(self, streams: int, tokens: int) -> int:
        """The sweep of one example that has so many streams a token, with the chains that it starts from."""
        return tokens * (streams * self._walker.width * self._walker.dtype.itemsize + self.chain())

    def read(self, receivers: Iterable[Receivers], tokens: int) -> int:
        """What receivers read from one set of senders in all their layers."""
        most = max((len(receiver.heads) for receiver in receivers), default=0)
        return most * self._walker.head_dim * tokens * self._walker.dtype.itemsize

    def slopes(self, slots: int, layers: int) -> int:
        """Slopes of one example's tail, and those of a layer once more, as exact as logits."""
        return slots * self._heads * (layers * self._walker.dtype.itemsize + self._walker.logits_dtype.itemsize)

    def projected(self) -> int:
        """One row while q, k or v are made: its norm, and in families with one matrix, all three."""
        return (self._heads + self._kv + 3 * self._walker.width) * self._working_itemsize

    def in_mlp(self) -> int:
        """One token of one set of senders on its way through an MLP."""
        return (7 * self._walker.width + 3 * self._walker.mlp_width) * self._working_itemsize

    def in_layer(self) -> int:
        """One token of one set of senders on its way through a layer."""
        attention = 4 * self._heads + 3 * self._kv + 4 * self._walker.n_heads * self._longest
        return attention * self._working_itemsize + self.in_mlp()

    def logits(self, whole: bool = False) -> int:
        """Logits of one row, with what a measure makes of them."""
        if self._tokens is None or whole:
            return 3 * self._walker.vocab_size * self._working_itemsize
        return (4 * self._tokens + 3 * self._walker.width) * self._working_itemsize

    def of_tokens(self) -> int:
        """Rows of the head's matrix for one example's tokens, which all its sets of senders share."""
        return 2 * (self._tokens or 0) * self._walker.width * self._working_itemsize


def pass_limit(walker: Walker, limit: float | int) -> float:
    """Bytes of one pass: the limit's share, and on a processor no more than its cache holds well."""
    share = PASS * limit
    return min(share, float(CACHE_MIB * MIB)) if walker.device.type == "cpu" else share


def at_least_one(limit: float | int, size: float | int) -> int:
    """How many of a size fit."""
    return max(1, int(limit / size))
