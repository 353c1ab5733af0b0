"""Keeping freed memory in the process: a training step allocates what the step before it freed."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h. Blocks beyond a size (32 MiB at most) are mapped one by one, and freed ones unmapped.
_TRIM_THRESHOLD, _MAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on the C library hands freed memory to the next allocation, never back to the system.

    Else each step gets its activations as fresh pages, which the system maps and clears anew. The process
    stays as large as it once was. False, with nothing changed, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_MAP_MAX, 0)) and bool(library.mallopt(_TRIM_THRESHOLD, _NEVER))
