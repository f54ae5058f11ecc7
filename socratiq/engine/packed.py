"""Layers made ready for sampling, where every weight meets few rows, many times, and no gradient is asked for.

A plain product of few rows spends much of its time on bringing the weight into the order in which oneDNN multiplies,
each time anew; here that is done once. And it starts dozens of small operations a layer: here query, key and value are
one product, gate and up are another, with all their adapters in two more. For the CPU of one process; elsewhere layers
stay as they are. The price is a copy of the weights, in the precision of the products.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from socratiq import lora
from socratiq.engine import fused


@contextlib.contextmanager
def packed(lm: nn.Module, rows: int):
    """Inside, the model multiplies by packed weights, made for `rows` rows at a time. No gradients pass, and adapters
    stay switched on or off as they are at the beginning."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else next(lm.parameters()).dtype
    changed, done = {}, set()
    if can_pack(next(lm.parameters()), dtype):
        for module in lm.modules():  # a layer comes before what it is made of
            if module in done:
                continue
            if can_pack_whole(module):
                changed[module] = pack_layer(module, rows, dtype)
            elif is_linear(module):  # the head, and parts of layers of other kinds
                changed[module] = pack_linears([module], rows, dtype)
            if module in changed:
                done.update(module.modules())
    before = {module: module.__dict__.get("forward") for module in changed}  # fused.py's, where it has its own
    for module, forward in changed.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def can_pack(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether such weights lie on a CPU whose PyTorch multiplies by oneDNN in that precision."""
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":  # FSDP's parts are of another type
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_linear(module: nn.Module) -> bool:
    """Whether this is a plain linear layer, with an adapter or without; one of 4 bits is not."""
    return type(base(module)) is nn.Linear


def base(linear: nn.Module) -> nn.Module:
    """The linear layer under an adapter, or the layer itself."""
    return linear.base if isinstance(linear, lora.LoRALinear) else linear


def can_pack_whole(layer: nn.Module) -> bool:
    """Whether this is a decoder layer as `pack_layer` computes it."""
    return fused.is_fused_layer(layer) and all(map(is_linear, projections(layer)))


def projections(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    of_attention = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def pack_layer(layer: nn.Module, rows: int, dtype: torch.dtype):
    """The forward of a decoder layer: what fused.py computes, without a thought of the backward pass."""
    q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = projections(layer)
    groups = [q_proj, k_proj, v_proj], [o_proj], [gate_proj, up_proj], [down_proj]
    to_heads, from_heads, to_mlp, from_mlp = (pack_linears(group, rows, dtype) for group in groups)
    attention, d = layer.self_attn, layer.self_attn.head_dim
    heads, kv_heads = base(q_proj).out_features // d, base(k_proj).out_features // d

    def norm(x, by):
        return F.rms_norm(x.to(by.weight.dtype), x.shape[-1:], by.weight, by.variance_epsilon).to(dtype)

    def forward(hidden, attend, read, position_embeddings, **kwargs):
        cos, sin = (x.unsqueeze(2) for x in position_embeddings)  # (1, N, 1, d)
        x = to_heads(norm(hidden, layer.input_layernorm)).unflatten(-1, (-1, d))  # (1, N, heads + 2 kv_heads, d)
        qk, v = x.split([heads + kv_heads, kv_heads], dim=2)
        if hasattr(attention, "q_norm"):  # Qwen3
            q, k = qk.split([heads, kv_heads], dim=2)
            qk = torch.cat([norm(q, attention.q_norm), norm(k, attention.k_norm)], dim=2)
        a, b = qk.chunk(2, dim=-1)
        qk = torch.addcmul(qk * cos, torch.cat([-b, a], dim=-1), sin).to(dtype)
        q, k, v = (x.transpose(1, 2) for x in (*qk.split([heads, kv_heads], dim=2), v))
        mixed = attend(attention.layer_idx, q, k, v, attention.scaling).flatten(2)  # (1, N, heads * d)
        if layer.last:
            mixed, hidden = mixed.index_select(1, read), hidden.index_select(1, read)
        hidden = hidden + from_heads(mixed)
        gate, up = to_mlp(norm(hidden, layer.post_attention_layernorm)).chunk(2, dim=-1)
        return hidden + from_mlp(F.silu(gate).mul_(up))

    return forward


def pack_linears(linears: list[nn.Module], rows: int, dtype: torch.dtype):
    """The forward of linear layers that share their input, end to end, by the operators that torch.compile uses."""
    bases = list(map(base, linears))
    weights = [x.weight.detach().to(dtype) for x in bases]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # (out, in); of the head a copy would be felt
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    bias = None if bases[0].bias is None else torch.cat([x.bias.detach().to(dtype) for x in bases])

    def product(x):
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")

    adapted = [linear for linear in linears if isinstance(linear, lora.LoRALinear) and linear.enabled]
    if not adapted:
        return product
    blocks = [x.lora_B.detach() * x.scale if x in adapted else torch.zeros(base(x).out_features, 0) for x in linears]
    A = torch.cat([x.lora_A.detach() for x in adapted]).to(dtype)  # (sum of r, in)
    B = torch.block_diag(*blocks).to(dtype)  # (out, sum of r)
    return lambda x: lora.AddLowRank.apply(x, product(x), None, None, A, B, 1.0)
