"""Low-rank adapters (Hu et al. 2021, eq. 3): W x becomes W x + (alpha / r) B A x, with W frozen and A, B trained.

A starts random, B at zero, so that the adapted model begins as the base model. Switching the adapters off gives the
base model back: that is the frozen reference of DPO and PPO, at no memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """Any linear module (a quantised one too) with a low-rank adapter beside it."""

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        start = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5))  # one on every device
        self.lora_A = nn.Parameter(start.to(base.weight.device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))  # (out, r)
        self.scale = alpha / rank
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        if not self.enabled:
            return self.base(x)
        if type(self.base) is nn.Linear:
            return AddLowRank.apply(x, None, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)
        return AddLowRank.apply(x, self.base(x), None, None, self.lora_A, self.lora_B, self.scale)


class AddLowRank(torch.autograd.Function):
    """W x + b + scale * B A x, computed in the precision of the frozen W.

    x (..., in), weight W (out, in), bias b (out,) or None, A (r, in), B (out, r) -> (..., out). Or, with None for W and
    b, what another kind of layer made of x, `y` (..., out): the rest is added into it in place. Keeps x, which the
    neighbours keep too, and A x. In the backward pass, too, the adapter's part is added into the larger one, where
    autograd would write both and then their sum.
    """

    @staticmethod
    def forward(ctx, x, y, weight, bias, A, B, scale):
        if y is None:
            y = F.linear(x, weight, bias)
        else:
            ctx.mark_dirty(y)
        x, A, B = (tensor.to(y.dtype) for tensor in (x, A, B))
        down = (x.flatten(0, -2) @ A.T).mul_(scale)  # (N, r)
        y.view(-1, y.shape[-1]).addmm_(down, B.T)
        ctx.save_for_backward(x, weight, A, B, down)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight, A, B, down = ctx.saved_tensors
        rows = d_y.flatten(0, -2)  # (N, out)
        d_down = (rows @ B).mul_(ctx.scale)  # (N, r)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_down @ A if weight is None else (rows @ weight.to(rows.dtype)).addmm_(d_down, A)
            d_x = d_x.view(x.shape)
        d_A, d_B = d_down.T @ x.flatten(0, -2), (down.T @ rows).T  # rows.T @ down takes longer
        return d_x, d_y if weight is None else None, None, None, d_A, d_B, None


def add_lora(model: nn.Module, rank: int, alpha: float | None = None, targets: tuple[str, ...] = TARGETS) -> None:
    """Freeze `model` and put an adapter on every linear module named in `targets`. `alpha` is 2 * rank if not given."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets:
                setattr(parent, name, LoRALinear(child, rank, 2.0 * rank if alpha is None else alpha))


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, adapter) pairs of a model, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def enable(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off."""
    for _, adapter in adapters(model):
        adapter.enabled = enabled


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict; a weight quantised to 4 bits stands in it as the numbers that its forward pass uses."""
    state = model.state_dict()
    for name, module in model.named_modules():
        quantised = getattr(getattr(module, "weight", None), "quant_state", None)
        if quantised is not None:
            from bitsandbytes.functional import dequantize_4bit

            for key in [key for key in state if key.startswith(f"{name}.weight.")]:  # scales and tables
                del state[key]
            state[f"{name}.weight"] = dequantize_4bit(module.weight.data, quantised)
    return state


def merged_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the plain model, made from the adapted model's: adapters are added into their weights.

    W + (alpha / r) B A is kept in float32: bfloat16 would swallow most of a small update.
    """
    state = dict(state)
    for name, adapter in adapters(model):
        weight, a, b = (state.pop(f"{name}.{part}") for part in ("base.weight", "lora_A", "lora_B"))
        state[f"{name}.weight"] = (weight.float() + adapter.scale * (b @ a)).cpu()
    return {name.replace(".base.", "."): tensor for name, tensor in state.items()}


def save_adapter(model: nn.Module, state: dict[str, torch.Tensor], folder: Path, base_name: str) -> None:
    """Write the adapters of a state dict in PEFT's file format: adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors, targets, rank, alpha = {}, set(), 0, 0.0
    for name, adapter in adapters(model):
        tensors[f"base_model.model.{name}.lora_A.weight"] = state[f"{name}.lora_A"].contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = state[f"{name}.lora_B"].contiguous()
        targets.add(name.rsplit(".", 1)[-1])
        rank = state[f"{name}.lora_A"].shape[0]
        alpha = adapter.scale * rank
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
