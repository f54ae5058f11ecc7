"""Keep freed memory instead of handing it back to the kernel at every step. For Linux with glibc; elsewhere a no-op.

By default glibc takes each very large tensor (32 MB and more) from the kernel and returns it when it is freed. The
kernel clears every page anew, 4 kB at a time, which shows where such tensors are made at every step. With the two
settings below they come from the heap and the heap is never trimmed, so that a step works in the pages of the step
before. The price: memory that is free within the process stays with the process until it ends.

The heap has holes. Twelve updates of SmolLM2 with every weight trained held 4.3 GB in the end, of which 2.8 were in use
at the peak; likely because glibc (2.36) asks for more than a tensor's size, to align it, and so does not find room in
the hole that one of the same size left. Returning free pages at every step (malloc_trim) made it 3.5 GB at 1.3 times
the time, at every eighth step it changed little. jemalloc has fewer holes: LD_PRELOAD=libjemalloc.so.2 in the
environment made it 3.3 GB, in no more time (bench/RESULTS.md); what stands here then does nothing.

SOCRATIQ_MALLOC=0 in the environment leaves the allocator alone.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of <malloc.h>


def tune() -> bool:
    """Apply the settings to this process, before large tensors are made. True if they were taken."""
    if sys.platform != "linux" or os.environ.get("SOCRATIQ_MALLOC") == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, such as musl
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
