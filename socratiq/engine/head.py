"""Twin of policy.head_logprobs: the head in chunks, whose logits are computed again in the backward pass."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from socratiq.engine.padding import missing, pad
from socratiq.policy import head_logprobs

CHUNK = 256  # scored positions: never more than 256 x vocabulary logits exist at once


def in_chunks(lm_head, hidden, tokens, temperature: float, watch: bool) -> dict[str, torch.Tensor]:
    """As head_logprobs: hidden (M, H), tokens (M,) -> "logprobs" (M,) and, to `watch`, "entropy" (M,)."""
    count = len(tokens)
    if torch.is_autocast_enabled("cpu"):
        hidden, tokens = pad(hidden, missing(count)), pad(tokens, missing(count))
    parts = []
    for chunk in zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True):
        if count <= CHUNK:
            parts.append(head_logprobs(lm_head, *chunk, temperature, watch))
        else:
            parts.append(checkpoint(head_logprobs, lm_head, *chunk, temperature, watch, use_reentrant=False))
    return {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}
