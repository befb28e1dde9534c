"""Freed memory goes back to the system, where a model is large enough for that to matter."""

import ctypes
import os
import sys
from typing import Any

LARGE = 64 << 20  # bytes of weights
M_MMAP_THRESHOLD = -3  # as in glibc's malloc.h
MAPPED_BYTES = 1 << 18  # beside a large model blocks from this size on get pages of their own


def give_freed_memory_back(network: Any) -> None:
    """Beside a large model give freed memory back at once, where the C library is glibc.

    By default blocks of up to 32 MiB are kept and larger ones go back. With a large model the tensors of a step leave
    gaps between the kept ones that nothing fits into: a LoRA step of a 100M model held 1.8 GiB in place of 1.2. Fresh
    pages cost time, which is felt most with small models; those keep the default. Where the environment says how
    (`MALLOC_...`), it stays so.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if sum(parameter.nbytes for parameter in network.parameters()) < LARGE:
        return
    c_library = ctypes.CDLL(None)
    try:
        c_library.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    except AttributeError:  # another C library
        return
