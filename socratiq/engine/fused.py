"""Pieces of a transformer layer with their gradients written out.

PyTorch differentiates anything, at a price: it keeps every intermediate result for the backward pass and walks through
memory once per operation. On a CPU, where memory is slow, that shows. Each function here computes what the plain
expression in its docstring computes, keeps only its inputs (or less), and fills in the gradient by hand.
"""

from __future__ import annotations

import contextlib
import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# oneDNN compiles a kernel of 0.6 MB for every product of a new size in bfloat16 and keeps it. Rows of all lengths would
# have it hold hundreds of megabytes within an hour; lengths that are multiples of this soon repeat.
ROUND = 32


def starts_cost(device: torch.device) -> bool:
    """Whether starting an operation takes longer than a small one itself: on a GPU, where many at once cost no more."""
    return device.type != "cpu"


def passing(like, dtype=None):
    """An empty tensor like another, for what is not kept until the backward pass.

    It has a little room behind it. glibc asks for more than a tensor's size, to align it, and so does not find room for
    one in the place that another of the same size has left: the heap would grow by these places at every layer.
    """
    size = like.numel()
    return like.new_empty(size + 64, dtype=dtype)[:size].view(like.shape)


class RowAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v, for rows short enough for the weights (heads, Lq, Lk) to exist at once.

    q (1, heads, Lq, d), k and v (1, kv_heads, Lk, d), mask from `additive_mask` -> (1, heads, Lq, d). Forward it is
    PyTorch's kernel. The gradient of that is made for long rows: here, heads that share a key head are stacked into one
    matrix and their weights made again, which takes a third of its time (bfloat16, 160 tokens that ask 224).
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        ctx.asking, ctx.asked, ctx.scale, ctx.mask = q.shape[2], k.shape[2], scale, mask
        fill = ctx.fill = len(mask) - q.shape[2]  # tokens at the end, which no other sees
        q, k, v = (F.pad(x[0], (0, 0, 0, fill)) for x in (q, k, v))  # copies, even where nothing is to be filled
        ctx.save_for_backward(q.mul_(scale).reshape(len(k), -1, q.shape[2]), k, v)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=1.0, enable_gqa=True)
        return out[:, :, : ctx.asking]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q_, k, v = ctx.saved_tensors  # q_ (kv_heads, heads per key head * Lq, d)
        scores = torch.bmm(q_, k.mT)  # (kv_heads, grouped * Lq, Lk)
        scores.view(-1, *ctx.mask.shape).add_(ctx.mask)
        weights = scores.softmax(-1)
        d_out = F.pad(d_out[0], (0, 0, 0, ctx.fill))
        d_out_ = d_out.reshape(q_.shape)
        d_v = torch.bmm(weights.mT, d_out_)
        d_weights = torch.bmm(d_out_, v.mT)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)  # p * (dp - sum(p dp))
        d_q = torch.bmm(d_scores, k).mul_(ctx.scale).view(d_out.shape)
        d_k = torch.bmm(d_scores.mT, q_)
        return d_q[None, :, : ctx.asking], d_k[None, :, : ctx.asked], d_v[None, :, : ctx.asked], None, None


def additive_mask(visible, q, k):
    """0 where q may look, by `visible` (Lq, Lk) or, None, causally; -inf elsewhere; for rows that are filled up."""
    asking, asked, fill = q.shape[2], k.shape[2], -q.shape[2] % ROUND
    if visible is None:
        visible = torch.ones(asking, asked, dtype=torch.bool, device=q.device).tril_(asked - asking)
    visible = F.pad(F.pad(visible, (0, fill), value=False), (0, 0, 0, fill), value=True)
    return q.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))


class RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), computed in float32, given back as `dtype`.

    Keeps x and one number a token. Under autocast the result is bfloat16 at once, where PyTorch would hand out float32
    that is then cast for the query, key, value, gate and up projections, each on its own.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        y, inverse = rms_norm(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, inverse)
        return y

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


def rms_norm(x, weight, eps, dtype):
    """(normed, 1 / sqrt(mean(x^2) + eps)) of x (..., H): (..., H) in `dtype` and (..., 1) in float32."""
    wide = x.float()
    y = torch.mul(wide, wide, out=passing(wide))
    inverse = y.mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(wide, inverse, out=y).mul_(weight)
    return y if dtype == y.dtype else passing(x, dtype).copy_(y), inverse


class Rotary(torch.autograd.Function):
    """x cos + rotate(x) sin, where rotate exchanges the halves (a, b) of a head's numbers for (-b, a).

    x (1, N, heads, d), cos and sin (1, N, d), whose two halves are alike -> (1, N, heads, d) in x's precision.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        cos, sin = ctx.saved_tensors
        return rotate(d_out, cos, -sin), None, None  # back by the same angle


def rotate(x, cos, sin):
    (a, b), out = x.chunk(2, dim=-1), passing(x)
    cos, sin = (y.chunk(2, dim=-1)[0].unsqueeze(-2) for y in (cos, sin))  # (1, N, 1, d / 2)
    first, second = out.chunk(2, dim=-1)
    first.copy_((a * cos).addcmul_(b, sin, value=-1))
    second.copy_((b * cos).addcmul_(a, sin))
    return out


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is computed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.ops.aten.silu.out(gate, out=passing(gate)).mul_(up)

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
    return normed(module, x, dtype)


def normed(norm, x, dtype):
    """RMSNorm as above; on a GPU PyTorch has it as one kernel."""
    if not starts_cost(x.device):
        return RMSNorm.apply(x, norm.weight, norm.variance_epsilon, dtype)
    with torch.autocast(x.device.type, enabled=False):  # which would keep x in float32 for the backward pass
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon).to(dtype)


@contextlib.contextmanager
def again(tensor, compute):
    """Inside, whoever would keep `tensor` for the backward pass gets compute() there: one for all who ask."""
    if not torch.is_grad_enabled():  # nobody keeps anything
        yield
        return
    place, waiting, made = tensor.data_ptr(), 0, None  # the address is nobody else's while the caller holds `tensor`

    def pack(kept):
        nonlocal waiting
        if kept.data_ptr() != place:
            return kept
        waiting += 1
        return kept.shape

    def unpack(kept):
        nonlocal waiting, made
        if not isinstance(kept, torch.Size):
            return kept
        value = compute() if made is None else made
        waiting -= 1
        made = value if waiting > 0 else None
        return value.view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _mlp_forward(module, x):
    """The product of silu(gate) and up, which down_proj would keep, is computed again in the backward pass."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    product = SwiGLU.apply(gate, up)
    if module.training:  # --grad-checkpoint (model.load_policy) keeps nothing, and has hooks of its own
        return module.down_proj(product)
    gate, up = gate.detach(), up.detach()
    with again(product, lambda: F.silu(gate).mul_(up)):
        return module.down_proj(product)


def _attention_forward(module, hidden_states, position_embeddings, attend, read=None, **kwargs):
    """Attention among the tokens (1, N, H), of all of them or of `read` (M,) -> (1, N or M, H)."""
    heads = *hidden_states.shape[:-1], -1, module.head_dim
    projections = module.q_proj, module.k_proj, module.v_proj
    q, k, v = (project(hidden_states).view(heads) for project in projections)  # (1, N, heads, d)
    if hasattr(module, "q_norm"):  # Qwen3
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = (Rotary.apply(y, *position_embeddings) for y in (q, k))
    mixed = attend(module.layer_idx, *(y.transpose(1, 2) for y in (q, k, v)), module.scaling).flatten(2)
    return module.o_proj(mixed if read is None else mixed.index_select(1, read)), None


def _layer_forward(layer, hidden, read, **kwargs):
    """A layer that keeps no normed tokens; the last one goes on from its attention with the tokens `read` alone.

    hidden (1, N, H), read (M,) -> (1, N, H), from the last layer (1, M, H).
    """
    if layer.training:  # as above
        hidden = type(layer).forward(layer, hidden, **kwargs)
        return hidden.index_select(1, read) if layer.last else hidden
    read = read if layer.last else None
    attended, _ = _through_norm(layer.input_layernorm, layer.self_attn, hidden, read=read, **kwargs)
    hidden = attended + (hidden if read is None else hidden.index_select(1, read))
    return hidden + _through_norm(layer.post_attention_layernorm, layer.mlp, hidden)


def _through_norm(norm, module, x, **kwargs):
    """module(norm(x)); the normed tokens are computed again in the backward pass."""
    y, x = norm(x), x.detach()
    dtype = y.dtype

    def compute():
        with torch.no_grad():
            return normed(norm, x, dtype)

    with again(y, compute):
        return module(y, **kwargs)


FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def fuse(lm: nn.Module) -> None:
    """Let a Llama, Mistral or Qwen model use the functions above; of other models the linear layers do."""
    for module in lm.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_linear_forward, module)
    parts = {"RMSNorm": _norm_forward, "Attention": _attention_forward, "DecoderLayer": _layer_forward}
    if getattr(lm.config, "hidden_act", None) == "silu":
        parts["MLP"] = _mlp_forward
    by_class = {family + part: forward for family in FAMILIES for part, forward in parts.items()}
    for module in lm.model.layers.modules():
        if type(module).__name__ in by_class:
            module.forward = types.MethodType(by_class[type(module).__name__], module)
            module.last = module is lm.model.layers[-1]


def is_fused_layer(module: nn.Module) -> bool:
    """Whether this is a decoder layer of which `fuse` has replaced every part."""
    return hasattr(module, "last") and hasattr(getattr(module, "mlp", None), "last")
