"""Pieces of a transformer layer with their gradients written out.

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

# oneDNN compiles a kernel of 0.6 MB for every product of a new size in bfloat16 and keeps it. Rows of all lengths would
# have it hold hundreds of megabytes within an hour; lengths that are multiples of this soon repeat.
ROUND = 32


class RowAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v, for rows short enough for the weights (heads, Lq, Lk) to be kept.

    q (1, heads, Lq, d), k and v (1, kv_heads, Lk, d), mask (Lq, Lk) -> (1, heads, Lq, d). The heads that share a key
    head are stacked into one matrix. In bfloat16 more than twice as fast as the CPU kernel of
    scaled_dot_product_attention, which is made for long rows and computes the weights anew in the backward pass.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        ctx.asking, ctx.asked, ctx.scale = q.shape[2], k.shape[2], scale
        fill = ctx.fill = -q.shape[2] % ROUND  # tokens at the end, which no other sees
        q, k, v = (F.pad(x[0], (0, 0, 0, fill)) for x in (q, k, v))
        mask = F.pad(F.pad(mask.to(q.dtype), (0, fill), value=float("-inf")), (0, 0, 0, fill))
        groups = k.shape[0], q.shape[0] // k.shape[0], *q.shape[1:]  # (kv_heads, heads per key head, Lq, d)
        q_ = (q * scale).reshape(groups[0], -1, groups[3])  # (kv_heads, grouped * Lq, d)
        scores = torch.bmm(q_, k.mT)  # (kv_heads, grouped * Lq, Lk)
        scores.view(*groups[:3], -1).add_(mask)
        weights = scores.softmax(-1)
        ctx.save_for_backward(q_, k, v, weights)
        return torch.bmm(weights, v).view(q.shape)[None, :, : ctx.asking]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q_, k, v, weights = ctx.saved_tensors
        d_out = F.pad(d_out[0], (0, 0, 0, ctx.fill))
        d_out_ = d_out.reshape(q_.shape)
        d_v = torch.bmm(weights.mT, d_out_)
        d_weights = torch.bmm(d_out_, v.mT)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)  # p * (dp - sum(p dp))
        d_q = torch.bmm(d_scores, k).mul_(ctx.scale).view(d_out.shape)
        d_k = torch.bmm(d_scores.mT, q_)
        return d_q[None, :, : ctx.asking], d_k[None, :, : ctx.asked], d_v[None, :, : ctx.asked], None, None


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


class Linear(torch.autograd.Function):
    """x W^T + b in the precision of x, of weights trained in a wider one.

    x (..., in), weight (out, in), bias (out,) or None -> (..., out). Keeps x and the weight itself. Autocast would keep
    its bfloat16 copy of every weight until the backward pass; here it is made again, which takes far less time than the
    product.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        rows = d_y.flatten(0, -2)  # (N, out)
        d_bias = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return d_y @ weight.to(d_y.dtype), (rows.T @ x.flatten(0, -2)).to(weight.dtype), d_bias


def _linear_forward(module, x):
    kind = x.device.type
    if module.weight.requires_grad and torch.is_grad_enabled() and torch.is_autocast_enabled(kind):
        return Linear.apply(x.to(torch.get_autocast_dtype(kind)), module.weight, module.bias)
    return F.linear(x, module.weight, module.bias)


def _norm_forward(module, x):
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return RMSNorm.apply(x, module.weight, module.variance_epsilon, dtype)


def _mlp_forward(module, x):
    """The product of silu(gate) and up, which down_proj would keep, is computed again in the backward pass.

    Not in train mode (model.load_policy): --grad-checkpoint, which keeps neither of them, has hooks of its own.
    """
    gate, up = module.gate_proj(x), module.up_proj(x)
    product = SwiGLU.apply(gate, up)
    if module.training:
        return module.down_proj(product)
    place, gate, up = product.data_ptr(), gate.detach(), up.detach()

    def pack(kept):
        return kept.shape if kept.data_ptr() == place else kept

    def unpack(kept):
        return F.silu(gate).mul_(up).view(kept) if isinstance(kept, torch.Size) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return module.down_proj(product)


def fuse(lm: nn.Module) -> None:
    """Let a Llama, Mistral or Qwen model use the functions above; of other models the linear layers do."""
    for module in lm.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_linear_forward, module)
    for module in lm.model.layers.modules():
        name = type(module).__name__
        if name in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
            module.forward = types.MethodType(_norm_forward, module)
        elif (
            name in ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
            and getattr(lm.config, "hidden_act", None) == "silu"
        ):
            module.forward = types.MethodType(_mlp_forward, module)
