"""Low-rank adapters (Hu et al. 2021, eq. 3): W x becomes W x + (alpha / r) B A x, with W frozen and A, B trained.

A starts random, B at zero, so the adapted model begins as the base model. A stage is saved with its adapters merged,
so switching new ones off gives the model that the next stage began with: PPO's frozen reference, at no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

ROUTERS = ("gate", "router")  # of a mixture of experts: frozen, without adapters


class LoRALinear(nn.Module):
    """Any linear module (a quantised one too) with a low-rank adapter beside it."""

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        # As nn.Linear and PEFT begin, drawn on the CPU: the same start on every device.
        start = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5))
        self.lora_A = nn.Parameter(start.to(base.weight.device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))  # (out, r)
        self.scale = alpha / rank
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        y = self.base(x)
        if not self.enabled:
            return y
        A, B = self.lora_A.to(y.dtype), self.lora_B.to(y.dtype)  # adapters compute in the precision of the frozen W
        return y + self.scale * F.linear(F.linear(x.to(y.dtype), A), B)


def add_lora(lm: nn.Module, rank: int, alpha: float | None = None) -> list[str]:
    """Freeze a causal language model and put an adapter on every linear module of its layers, routers excepted.

    As PEFT's target "all-linear". `alpha` is 2 * rank if not given. Returns the names of the large weights of a layer
    that get none, such as the fused experts of a mixture.
    """
    lm.requires_grad_(False)
    for parent in list(lm.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name not in ROUTERS:
                setattr(parent, name, LoRALinear(child, rank, 2.0 * rank if alpha is None else alpha))
    matrices = {name.split(".", 1)[1] for name, weight in lm.model.layers.named_parameters() if weight.ndim > 1}
    return sorted(name for name in matrices if "lora_" not in name and not name.endswith(".base.weight"))


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, adapter) pairs of a model, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def enable(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off."""
    for _, adapter in adapters(model):
        adapter.enabled = enabled


def merged_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the plain model, made from the adapted model's: adapters are added into their weights.

    W + (alpha / r) B A is kept in float32: bfloat16 rounds much of a small update away.
    """
    state = dict(state)
    for name, adapter in adapters(model):
        weight, a, b = (state.pop(f"{name}.{part}") for part in ("base.weight", "lora_A", "lora_B"))
        state[f"{name}.weight"] = (weight.float() + adapter.scale * (b @ a)).cpu()
    return {name.replace(".base.", "."): tensor for name, tensor in state.items()}
