"""Housekeeping of memory that a process need not do. No result depends on it.

*Freed memory* stays with the process, so that it need not be asked for, and cleared, again and again. Every tensor of
more than 128 KiB that a step makes and drops is otherwise mapped from the system and given back, page by page: a tenth
to a fifth of the processor time of training and analysing a small model.

*Modules* stay, too: the collector of reference cycles need not look through all objects of torch and
transformers again, nor copy their pages in every forked process, nor take them apart at the end, which takes a fifth
as long as to import them.
"""

import ctypes
import gc
import sys

# parameters of glibc's mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Take large blocks from the heap, too, and never shrink it; does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**26)


def keep_what_exists() -> None:
    """The collector of reference cycles leaves alone, from now on, what exists now."""
    gc.freeze()
