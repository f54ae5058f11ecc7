"""What both sides of a comparison share: a step is run when the parent says so, and reported back in one line.

The parent (compare.py) writes "go" and waits; while one side works, the other sleeps in readline.
"""

import ctypes
import json
import os
import resource
import sys
import time


class Parent:
    """The line to compare.py. Whatever else the program prints goes to stderr."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.started, self.took = None, {}

    def stop(self) -> None:
        """Stop the clock of the step, if it runs."""
        if self.started is not None:
            self.took = {
                "seconds": time.perf_counter() - self.started,
                "cpu_seconds": time.process_time() - self.cpu,
            }
            self.started = None

    def wait(self, **ready) -> None:
        """Report, sleep until the parent says "go", start the clock. Ends the process when the parent says "end"."""
        self.stop()
        ready |= self.took
        ready["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(ready), file=self.answers, flush=True)
        word = sys.stdin.readline().strip()
        if word == "peak":  # the speed of the largest matrix products the machine can do now
            self.took = {}
            return self.wait(peak=matmul_peak(self.dtype))
        if word != "go":
            os._exit(0)
        self.started, self.cpu = time.perf_counter(), time.process_time()


def matmul_peak(dtype: str) -> float:
    """Best of five products of two 2048 x 2048 matrices, in floating-point operations per second."""
    import torch

    a, b = torch.randn(2, 2048, 2048).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def allocator(tuned: bool) -> None:
    """The same setting on both sides: socratiq/allocator.py, applied here to whichever side this is.

    What belongs to our sampling, handing pages back at its end, stays on with it.
    """
    os.environ["SOCRATIQ_MALLOC"] = "1" if tuned else "0"
    if tuned:
        mallopt = ctypes.CDLL(None).mallopt
        assert mallopt(-3, 2**25) and mallopt(-1, 2**31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
