"""What both sides of a comparison share: a step is run when the parent says so, and reported back in one line.

The parent (compare.py) writes "go" and waits; while one side works, the other sleeps in readline.
"""

import json
import os
import resource
import sys
import time


class Parent:
    """The line to compare.py. Everything else that the program prints goes to stderr."""

    def __init__(self, plan: dict):
        self.cuda = plan["device"] == "cuda"
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
        answer = {**ready, **self.took, "peak_mb": self.peak_mb()}
        print(json.dumps(answer), file=self.answers, flush=True)
        if sys.stdin.readline().strip() != "go":
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

            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
