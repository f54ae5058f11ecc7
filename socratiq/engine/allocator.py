"""Keep freed memory instead of handing it back to the kernel at every step. For Linux with glibc; elsewhere a no-op.

By default glibc takes ever larger tensors from the heap, and gives the end of the heap back to the kernel whenever it
is free. The kernel clears every page anew, 4 kB at a time, when a step asks for it again. With the two settings below
the heap is never trimmed, so that a step works in the pages of the step before. The price: memory that is free within
the process stays with the process. Only `give_back`, which sampling calls when its packed copy of the weights and its
cache are gone, returns it: 15 ms a rollout, and 0.5 GB less after four (SmolLM2, 64 questions each).

The heap has holes, likely because glibc (2.36) asks for more than a tensor's size, to align it, and so does not find
room in the hole that one of the same size left. The largest tensors, of the size of the embedding, are therefore taken
from the kernel one by one: the pages of so few cost little. Eight updates of SmolLM2 with every weight trained, of
which 3.1 GB were in use at the peak, held 4.3 GB with all from the heap, and 3.7 to 4.1 GB in five runs so and with
the optimiser's moments below all that comes and goes (training.make_optimizer), in the same time. Tensors of 8 MB and
more from the kernel: 3.7 GB; free pages returned at every step (malloc_trim): less, at 1.3 times the time. jemalloc has
fewer holes, too (LD_PRELOAD=libjemalloc.so.2 in the environment, where what stands here does nothing).

SOCRATIQ_MALLOC=0 in the environment leaves the allocator alone.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of <malloc.h>
LARGE = 2**25  # bytes; glibc takes no higher threshold


def tune() -> bool:
    """Apply the settings to this process, before large tensors are made. True if they were taken."""
    mallopt = _function("mallopt")
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def give_back() -> None:
    """Hand what is free within the heap back to the kernel. For once in a while, when much has just been freed."""
    trim = _function("malloc_trim")
    if trim:
        trim(0)


def _function(name: str):
    """Of the C library, or None: not on Linux, not wanted, or another library, such as musl."""
    wanted = sys.platform == "linux" and os.environ.get("SOCRATIQ_MALLOC") != "0"
    return getattr(ctypes.CDLL(None), name, None) if wanted else None
