"""The C library's allocator, told to keep large blocks.

Every step of a training, and every block of an evaluation, frees the same large arrays and asks for
them again. By its defaults glibc hands arrays above 32 MiB, and what is free at the end of its
heap, back to the system, which maps and clears their pages anew each time: a sixth of the time of
an IWAE step with 5000 x 784 logits (``docs/performance.md``).
"""

from __future__ import annotations

import functools
import os
from typing import Any

__all__ = ["give_back", "keep_large_blocks"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 2**30  # a block above it goes back to the system when it is freed


@functools.cache
def keep_large_blocks() -> bool:
    """Freed blocks up to 1 GiB stay with the process, for the next of their size.

    Before torch's first allocation, it also asks for huge pages (``THP_MEM_ALLOC_ENABLE``).

    Only of glibc, and not where the environment has settings of its own (``MALLOC_…``,
    ``GLIBC_TUNABLES``).

    Returns:
        Whether the allocator was told so.
    """
    own = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if own or not _is_glibc():
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once
    mallopt = _c_library().mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))


def give_back() -> None:
    """Hand what is free, wherever it lies in the heap, back to the system; only of glibc.

    Data that are read from a file in blocks leave holes of many sizes, which otherwise add up.
    """
    if _is_glibc():
        _c_library().malloc_trim(0)


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # another system
        return False


def _c_library() -> Any:
    import ctypes

    return ctypes.CDLL(None)
