"""Forward functions for layers of known kinds, which keep less for the backward pass than the plain expressions do.

PyTorch differentiates anything, and keeps every intermediate result for that. Each function here computes what the
plain expression in its docstring computes, keeps only its inputs (or less), and has its gradient written out.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from socratiq.lora import LoRALinear

GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")  # down(act(gate(x)) * up(x))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_out * up, gate), F.silu(gate).mul_(d_out)


class AddLowRank(torch.autograd.Function):
    """W x + b + scale * B A x, computed in the precision of the frozen W.

    x (..., in), W (out, in), b (out,) or None, A (r, in), B (out, r) -> (..., out). Keeps x, which the neighbours keep
    too, and A x. In both directions the adapter's part is added into the larger one in place.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        y = F.linear(x, weight, bias)
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
            d_x = (rows @ weight.to(rows.dtype)).addmm_(d_down, A).view(x.shape)
        return d_x, None, None, d_down.T @ x.flatten(0, -2), (down.T @ rows).T, None


def mlp_forward(mlp, x):
    """The forward of a gated MLP module with silu."""
    return mlp.down_proj(SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def lora_forward(adapter, x):
    """The forward of a LoRALinear on a plain linear layer."""
    if not adapter.enabled or not torch.is_grad_enabled():
        return LoRALinear.forward(adapter, x)
    base = adapter.base
    return AddLowRank.apply(x, base.weight, base.bias, adapter.lora_A, adapter.lora_B, adapter.scale)


def fuse(lm: nn.Module) -> None:
    """Let layers of these kinds use the functions above; all others stay as they are."""
    silu = getattr(lm.config, "hidden_act", None) == "silu"
    for module in lm.modules():
        if silu and type(module).__name__ in GATED_MLPS:
            module.forward = types.MethodType(mlp_forward, module)
        elif type(module) is LoRALinear and type(module.base) is nn.Linear:
            module.forward = types.MethodType(lora_forward, module)
