"""The C library's memory: freed blocks of some size go back to the system at once.

glibc keeps what is freed and, as larger blocks come and go, takes ever larger ones from its own
heap (up to 32 MiB), where a training step's tensors of many sizes leave holes. With a fixed
threshold each large block is mapped and unmapped by itself.
"""

from __future__ import annotations

import ctypes
import os
import sys

THRESHOLD = 4 << 20
"""Blocks of so many bytes are mapped by themselves."""
_MMAP_THRESHOLD = -3
"""What glibc's malloc.h calls M_MMAP_THRESHOLD."""


def return_freed() -> bool:
    """Fix the threshold, and return whether that was possible: on Linux with glibc.

    Where the environment sets a threshold (`MALLOC_MMAP_THRESHOLD_`) that one stays.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, THRESHOLD))
    except (OSError, AttributeError):  # a C library without it
        return False
