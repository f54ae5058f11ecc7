"""Three pieces of a transformer layer with their gradients written out.

PyTorch differentiates anything, at a price: it keeps every intermediate result for the backward pass and walks through
memory once per operation. On a CPU, where memory is slow, that shows. Each function here computes what the plain
expression in its docstring computes, keeps only its inputs (or less), and fills in the gradient by hand.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class RowAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v, for rows short enough for the weights (heads, Lq, Lk) to be kept.

    q (1, heads, Lq, d), k and v (1, kv_heads, Lk, d), mask (Lq, Lk) -> (1, heads, Lq, d). The heads that share a key
    head are stacked into one matrix. In bfloat16 more than twice as fast as the CPU kernel of
    scaled_dot_product_attention, which is made for long rows and computes the weights anew in the backward pass.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        groups = k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:]  # (kv_heads, heads per key head, Lq, d)
        q_ = (q[0] * scale).reshape(groups[0], -1, groups[3])  # (kv_heads, grouped * Lq, d)
        k, v = k[0], v[0]
        scores = torch.bmm(q_, k.mT)  # (kv_heads, grouped * Lq, Lk)
        scores.view(*groups[:3], -1).add_(mask.to(q.dtype))
        weights = scores.softmax(-1)
        ctx.save_for_backward(q_, k, v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q_, k, v, weights = ctx.saved_tensors
        d_out_ = d_out.reshape(q_.shape)
        d_v = torch.bmm(weights.mT, d_out_)
        d_weights = torch.bmm(d_out_, v.mT)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)  # p * (dp - sum(p dp))
        d_q = torch.bmm(d_scores, k).mul_(ctx.scale).view(d_out.shape)
        return d_q, torch.bmm(d_scores.mT, q_)[None], d_v[None], None, None


class RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), computed in float32, given back as `dtype`.

    Keeps x and one number a token. Under autocast the result is bfloat16 at once, where PyTorch would hand out float32
    that is then cast for the query, key, value, gate and up projections, each on its own.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, inverse = ctx.saved_tensors
        d_out, normal = d_out.float(), x.float() * inverse
        d_normal = d_out * weight
        # d x_i = (d n_i - n_i mean_j(d n_j n_j)) / rms
        d_x = torch.addcmul(d_normal, normal, (d_normal * normal).mean(-1, keepdim=True), value=-1).mul_(inverse)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = normal.mul_(d_out).flatten(0, -2).sum(0).to(weight.dtype)
        return d_x.to(x.dtype), d_weight, None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is computed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_out * up, gate), F.silu(gate).mul_(d_out)


def _norm_forward(module, x):
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return RMSNorm.apply(x, module.weight, module.variance_epsilon, dtype)


def _mlp_forward(module, x):
    return module.down_proj(SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


def fuse(lm: nn.Module) -> None:
    """Let the layers of a Llama, Mistral or Qwen model use the functions above; other models stay as they are."""
    for module in lm.model.layers.modules():
        name = type(module).__name__
        if name in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
            module.forward = types.MethodType(_norm_forward, module)
        elif (
            name in ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
            and getattr(lm.config, "hidden_act", None) == "silu"
        ):
            module.forward = types.MethodType(_mlp_forward, module)
