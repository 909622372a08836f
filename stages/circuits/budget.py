"""What runs and passes take in memory, so that a limit can say how many prompts go at once.

All counts are bytes of tensors that are alive at the worst moment, for one prompt in one variant. They are on the safe
side of what is measured (tests/test_memory.py), since families differ in how many copies of a stream they make.

Shapes as in `walker`: s window slots of prompts of t tokens, d residual width, h query heads, g key-value heads, a head
width, m the width of an MLP.
"""

from collections.abc import Collection

from stages.circuits.attention import FUSED_SLOTS
from stages.circuits.walker import KEPT, Walker

MIB = 2**20

# On a processor a pass with a larger working set loses it from the cache between two operations, and is slower.
IN_CACHE = 32 * MIB


def run_bytes(walker: Walker, length: int, keep: Collection[str] = KEPT) -> int:
    """A `Run` of one prompt, of which so much is kept."""
    kv = walker.n_layers * walker.n_kv_heads * walker.head_dim
    numbers = {
        "residual": (walker.n_layers + 1) * walker.width,
        "z": walker.n_layers * walker.n_heads * walker.head_dim,
        "keys": kv,
        "values": kv,
    }
    return length * sum(numbers[name] for name in keep) * walker.dtype.itemsize + _logits(walker)


def making_bytes(walker: Walker, length: int, keep: Collection[str] = KEPT) -> int:
    """A run while it is made, itself included."""
    return run_bytes(walker, length, keep) + pass_bytes(walker, length, length)


def outputs_bytes(walker: Walker, length: int) -> int:
    """Head outputs of one prompt while they are made (`Walker.head_outputs`): at the end they exist twice."""
    z = length * walker.n_layers * walker.n_heads * walker.head_dim * walker.dtype.itemsize
    return z + max(z, _layer(walker, length, length))


def pass_bytes(walker: Walker, slots: int, length: int) -> int:
    """One variant of one prompt in a pass without gradients, its logits over the whole vocabulary included."""
    return max(_layer(walker, slots, length), (2 if walker.architecture.final_softcap() else 1) * _logits(walker))


def gradient_bytes(walker: Walker, slots: int, length: int, layers: int) -> int:
    """One prompt in a pass through so many layers that keeps what gradients need."""
    heads = walker.n_heads * walker.head_dim
    kept = 10 * walker.width + 5 * walker.mlp_width + 8 * heads + 4 * walker.n_heads * length
    of_layers = layers * slots * kept * walker.dtype.itemsize
    return of_layers + _layer(walker, slots, length) + 4 * _logits(walker)


def rows_that_fit(walker: Walker, each: int, memory: float, transient: int | None = None) -> int:
    """How many prompts, or variants of prompts, go at once; at least 1.

    Args:
        walker: the model.
        each: bytes that one of them takes.
        memory: bytes that all may take.
        transient: the part of `each` that operations go over again and again; all of it if None.
    """
    fit = int(memory) // each
    if walker.device.type == "cpu":
        fit = min(fit, IN_CACHE // (each if transient is None else transient))
    return max(1, fit)


def _layer(walker: Walker, slots: int, length: int) -> int:
    """The working set of one layer: its stream, and attention or MLP, whichever takes more."""
    heads, groups = walker.n_heads * walker.head_dim, walker.n_kv_heads * walker.head_dim
    attention = slots * (5 * heads + 4 * groups)
    if walker.device.type == "cpu" and slots >= FUSED_SLOTS and walker.architecture.softcap(0) is None:
        # keys and values of a variant in one tensor, perhaps spread over the query heads, and a mask
        attention += length * (2 * groups + (2 * heads if groups < heads else 0)) + slots * length
    else:  # scores, masked scores, weights; background and window apart and together
        attention += 2 * length * groups + 5 * slots * walker.n_heads * length
    return (slots * 6 * walker.width + max(attention, slots * 4 * walker.mlp_width)) * walker.dtype.itemsize


def _logits(walker: Walker) -> int:
    """Logits of one prompt, as the head gives them and as measures read them."""
    same = walker.logits_dtype == walker.dtype
    return walker.vocab_size * (walker.logits_dtype.itemsize + (0 if same else walker.dtype.itemsize))
