"""Keeping freed memory for the next call.

A call of a network on a CPU allocates and frees from ten megabytes (a molecule) to gigabytes (thousands of atoms).
Where the C library returns them to the system, the system has to clear every page anew for the next call, which takes
up to half of the time of a call. docs/performance-history.md has the figures.
"""

from __future__ import annotations

import ctypes
from functools import cache

# Bytes: with its header just below 32 MiB, the largest block that glibc learns from (mallopt(3), M_MMAP_THRESHOLD).
_LARGEST_LEARNT = 33_500_000
# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@cache
def keep_freed_memory() -> bool:
    """Keep all that this process frees for its own use, from now on and until it ends.

    For a process whose main work is calls on a CPU: dynamics, training. `mmea` does it; a script may, at its beginning:
    from 500 atoms on, and for training, it saves a third of the time. Another library's calls become faster too. The
    process keeps the most that it ever needed, which is why importing this package does not do it.

    Returns:
        whether the C library can be told so: glibc can, on Linux.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; on Windows no such library
        return False
    # No blocks of their own from the system, and none of the others back to it.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


@cache
def keep_small_blocks() -> None:
    """Free one block of 32 MB, once in a process: glibc keeps as much at hand from then on.

    It is what happens in any program that frees such a block, and is enough for calls on a few molecules. Where another
    C library allocates, it does nothing.
    """
    import torch

    torch.empty(_LARGEST_LEARNT, dtype=torch.uint8)


__all__ = ["keep_freed_memory", "keep_small_blocks"]
