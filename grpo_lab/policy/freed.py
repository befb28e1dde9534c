"""What becomes of freed memory: kept for the next step's tensors where a model is small, given back where it is large."""

import ctypes
import os
import sys
from typing import Any

LARGE = 64 << 20  # bytes of weights
# As in glibc's malloc.h; the first and the last are 128 KiB and 65536 by default.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MAPPED_BYTES = 1 << 18  # beside a large model blocks from this size on get pages of their own
NEVER = (1 << 31) - 1


def govern_freed_memory(network: Any) -> None:
    """Beside a small model keep freed memory, beside a large one give it back at once, where the C library is glibc.

    By default blocks of up to 32 MiB are kept and larger ones go back. With a large model the tensors of a step leave
    gaps between the kept ones that nothing fits into: a LoRA step of a 100M model held 1.8 GiB in place of 1.2. With a
    small one the fresh pages of the larger ones cost more than their memory is worth: 7 % of a learning step of a 7M
    model, whose peak was the same with and without. Where the environment says how (`MALLOC_...`), it stays so.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    large = sum(parameter.nbytes for parameter in network.parameters()) >= LARGE
    give_back = {M_MMAP_MAX: 1 << 16, M_TRIM_THRESHOLD: 1 << 17, M_MMAP_THRESHOLD: MAPPED_BYTES}
    options = give_back if large else {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER}
    c_library = ctypes.CDLL(None)
    try:
        for option, value in options.items():
            c_library.mallopt(option, value)
    except AttributeError:  # another C library
        return
