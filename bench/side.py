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

    def __init__(self, plan: dict):
        self.dtype, self.cuda, self.peak = plan["dtype"], plan["device"] == "cuda", 0
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.started, self.took = None, {}

    def stop(self) -> None:
        """Stop the clock of the step, if it runs."""
        if self.started is not None:
            self.synchronize()
            self.took = {
                "seconds": time.perf_counter() - self.started,
                "cpu_seconds": time.process_time() - self.cpu,
            }
            self.started = None

    def wait(self, **ready) -> None:
        """Report, sleep until the parent says "go", start the clock. Ends the process when the parent says "end"."""
        self.stop()
        ready |= self.took
        ready["peak_mb"] = self.peak_mb()
        print(json.dumps(ready), file=self.answers, flush=True)
        word = sys.stdin.readline().strip()
        if word == "peak":  # the speed of the largest matrix products the machine can do now
            self.took = {}
            return self.wait(peak=self.matmul_peak())
        if word != "go":
            os._exit(0)
        self.synchronize()
        self.started, self.cpu = time.perf_counter(), time.process_time()

    def synchronize(self) -> None:
        """A GPU works on while Python is ahead of it."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def peak_mb(self) -> float:
        """The most memory held so far: resident, or on the GPU what PyTorch's allocator handed out."""
        if self.cuda:
            import torch

            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
            return self.peak / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def matmul_peak(self) -> float:
        """Best of five products of two square matrices, in floating-point operations per second."""
        import torch

        size = 8192 if self.cuda else 2048
        a, b = torch.randn(2, size, size, device="cuda" if self.cuda else "cpu").to(getattr(torch, self.dtype))
        best = float("inf")  # seconds
        for _ in range(5):
            self.synchronize()
            started = time.perf_counter()
            a @ b
            self.synchronize()
            best = min(best, time.perf_counter() - started)
        del a, b
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        return 2 * size**3 / best


def allocator(tuned: bool) -> None:
    """The same setting on both sides: glibc keeps freed memory, and a step works in the pages of the one before."""
    if tuned:
        mallopt = ctypes.CDLL(None).mallopt
        assert mallopt(-3, 2**25) and mallopt(-1, 2**31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
