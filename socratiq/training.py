"""What the three training loops share: optimiser, schedule, order of the rows, one update.

No loss is computed here. Every random draw comes from a generator seeded with (seed, purpose, number of the step or
epoch), so that any step can be computed again from its number alone.
"""

from __future__ import annotations

import hashlib
import math

import torch

from socratiq.run.errors import UserError


def make_optimizer(policy, lr: float, eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW without weight decay on the trainable parameters, as one fused kernel where there is one."""
    fused = policy.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(policy.trainable().values(), lr=lr, eps=eps, weight_decay=0.0, fused=fused)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then linear decay to zero after step `steps` - 1. Steps count from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator whose stream depends on the seed and the purpose ("order", epoch) alone."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A number of 63 bits, a hash of seed and purpose."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def epoch_windows(rows: int, window: int, seed: int, epoch: int) -> list[list[int]]:
    """The row numbers of one epoch in a random order, cut into windows (the last may be short)."""
    order = torch.randperm(rows, generator=generator(seed, "order", epoch)).tolist()
    return [order[start : start + window] for start in range(0, rows, window)]


def minibatches(rows: int, parts: int, passes: int, seed: int, step: int) -> list[list[int]]:
    """The row numbers of every minibatch of a PPO update: `passes` random orders, each cut into (up to) `parts`."""
    draws = [generator(seed, "minibatches", step, epoch) for epoch in range(passes)]
    orders = [torch.randperm(rows, generator=draw).tolist() for draw in draws]
    return [order[part::parts] for order in orders for part in range(min(parts, rows))]


def perplexity(loss: float) -> float:
    """exp(loss); infinity where no float can hold it."""
    return math.exp(loss) if not loss > 700 else math.inf


def update(policy, optimizer, loss: float, lr: float, max_grad_norm: float, label: str, sources: list[str]) -> float:
    """Clip the gradient to `max_grad_norm`, step the optimiser, clear the gradient -> the norm before clipping.

    Raises UserError, before the weights change, if the loss or the gradient is not finite. `label` ("sft step 3")
    and `sources` ("data.csv row 7", ...) are for that message.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable().values(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a sharded model's is spread as well
    check_finite({"loss": loss, "gradient norm": norm}, label, sources)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(numbers: dict[str, float], label: str, sources: list[str]) -> None:
    """Raise UserError, naming the step and the sources of its rows, if one of the numbers is NaN or infinite."""
    bad = [f"{name} is {number:g}" for name, number in numbers.items() if not math.isfinite(number)]
    if bad:
        rows = ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")
        raise UserError(f"{label}: {', '.join(bad)}; this step was not taken; lower --lr, or check the rows: {rows}")


def draw(items: list, count: int, seed: int) -> list:
    """At most `count` of the items, drawn by the seed, in their own order."""
    chosen = torch.randperm(len(items), generator=generator(seed, "held out"))[:count]
    return [items[i] for i in sorted(chosen.tolist())]
