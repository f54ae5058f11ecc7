"""A linear layer with its adapter in one step of autograd, and the gated MLP in front of it.

PyTorch differentiates anything, and keeps every intermediate result for that. The function here computes what the
expression in its docstring computes, keeps less, and has its gradient written out.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from socratiq.lora import LoRALinear

GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")  # down(act(gate(x)) * up(x))


class AddLowRank(torch.autograd.Function):
    """W x + b + scale * B A x, computed in the precision of the frozen W; x may be given as silu(gate) * up.

    x, or gate and up, (..., in), W (out, in), b (out,) or None, A (r, in), B (out, r) -> (..., out). Keeps A x and x,
    which its neighbours keep too; or else gate and up, from which x is computed again in the backward pass. In both
    directions the adapter's part is added into the larger one in place.
    """

    @staticmethod
    def forward(ctx, x, up, weight, bias, A, B, scale):
        given = x, up
        if up is not None:
            x = F.silu(x).mul_(up)
        y = F.linear(x, weight, bias)
        x, A, B = (tensor.to(y.dtype) for tensor in (x, A, B))
        down = (x.flatten(0, -2) @ A.T).mul_(scale)  # (N, r)
        y.view(-1, y.shape[-1]).addmm_(down, B.T)
        ctx.save_for_backward(*given, weight, A, B, down)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, up, weight, A, B, down = ctx.saved_tensors
        rows = d_y.flatten(0, -2)  # (N, out)
        d_down = (rows @ B).mul_(ctx.scale)  # (N, r)
        d_x = d_up = None
        if ctx.needs_input_grad[0]:
            d_x = (rows @ weight.to(rows.dtype)).addmm_(d_down, A).view(x.shape)
        if up is not None:
            gate, silu = x, F.silu(x)
            d_up = d_x * silu
            d_x = torch.ops.aten.silu_backward(d_x.mul_(up), gate)
            x = silu.mul_(up)
        d_A, d_B = d_down.T @ x.flatten(0, -2).to(rows.dtype), (down.T @ rows).T
        return d_x, d_up, None, None, d_A, d_B, None


def adapted(layer, x, up=None):
    """AddLowRank of a LoRALinear."""
    return AddLowRank.apply(x, up, layer.base.weight, layer.base.bias, layer.lora_A, layer.lora_B, layer.scale)


def lora_forward(layer, x):
    """The forward of a LoRALinear on a plain linear layer."""
    return adapted(layer, x) if layer.enabled and torch.is_grad_enabled() else LoRALinear.forward(layer, x)


def mlp_forward(mlp, x):
    """The forward of a gated MLP with silu and adapters."""
    if not mlp.down_proj.enabled or not torch.is_grad_enabled():
        return type(mlp).forward(mlp, x)
    return adapted(mlp.down_proj, mlp.gate_proj(x), mlp.up_proj(x))


def fuse(lm: nn.Module) -> None:
    """Let adapters, and MLPs of these kinds with adapters, use the function above; all else stays as it is."""
    silu = getattr(lm.config, "hidden_act", None) == "silu"
    for module in lm.modules():
        if is_adapted(module):
            module.forward = types.MethodType(lora_forward, module)
        elif silu and type(module).__name__ in GATED_MLPS and is_adapted(module.down_proj):
            module.forward = types.MethodType(mlp_forward, module)


def is_adapted(module: nn.Module) -> bool:
    """Whether this is an adapter on a plain linear layer, not on one of 4 bits."""
    return type(module) is LoRALinear and type(module.base) is nn.Linear
