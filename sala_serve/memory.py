"""Memory of a process that serves: what is large goes back to the system, what stays is not looked at again."""

from __future__ import annotations

import ctypes
import gc

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
LARGE_BYTES = 256 * 1024


def keep_large_blocks_apart() -> None:
    """Let every block from ``LARGE_BYTES`` on go back to the system when it is freed.

    glibc raises that bound to the size of what was freed, up to 32 MiB; bodies then come from heaps, where any small
    block behind them keeps them resident. Elsewhere (musl) nothing is done.
    """
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(_MMAP_THRESHOLD, LARGE_BYTES)


def give_back() -> None:
    """Return to the system what is free."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


def freeze_what_stays() -> None:
    """Leave what has been loaded so far out of all later garbage collections.

    Those 120,000 objects are modules, models and routes; to look at all of them takes some 100 ms, in which every
    request stands still.
    """
    gc.collect()
    gc.freeze()
