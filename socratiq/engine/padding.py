"""Numbers of tokens rounded up to a multiple of 32, for bfloat16 on a CPU.

oneDNN compiles a kernel of 0.6 MB for every bfloat16 product of a new size, and keeps it. Batches of all sizes make the
process grow by 10 to 20 MB an update; multiples of 32 soon repeat.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from socratiq.engine.attention import ShortRows
from socratiq.policy import Policy

MULTIPLE = 32


def missing(tokens: int) -> int:
    """How many tokens fill up to a multiple of 32."""
    return -tokens % MULTIPLE


def pad(x: torch.Tensor, count: int) -> torch.Tensor:
    """x (N, ...) with `count` zeros behind it."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, count))


def padded_hidden(policy, input_ids, position_ids, attend, read) -> torch.Tensor:
    """Policy.hidden, with more tokens behind the rows of a batch. They see nothing, and none of them is read."""
    if isinstance(attend, ShortRows):  # not in the sampler, whose attention is its cache's
        more = missing(len(input_ids))
        input_ids, position_ids = pad(input_ids, more), pad(position_ids, more)
    return Policy.hidden(policy, input_ids, position_ids, attend, read)
