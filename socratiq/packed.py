"""Linear layers made ready for many small products, as sampling asks for: every weight meets few rows, many times.

A plain product of few rows spends much of its time on bringing the weight into the order in which oneDNN multiplies,
each time anew. Here that is done once, and adapters are cast once to the precision of the products. For the CPU of one
process; elsewhere layers stay as they are. The price is a copy of the weights, in the precision of the products.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from socratiq import lora


@contextlib.contextmanager
def packed(lm: nn.Module, rows: int):
    """Inside, the model multiplies by packed weights, made for `rows` rows at a time. No gradients pass."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else next(lm.parameters()).dtype
    changed = {}
    if can_pack(next(lm.parameters()), dtype):
        changed |= {m: pack_linear(m, rows, dtype) for m in lm.modules() if type(m) is nn.Linear}
        changed |= {m: cast_adapter(m, dtype) for _, m in lora.adapters(lm)}
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


def pack_linear(linear: nn.Linear, rows: int, dtype: torch.dtype):
    """The forward of a linear layer, by the operators that torch.compile uses for frozen weights."""
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")


def cast_adapter(adapter: lora.LoRALinear, dtype: torch.dtype):
    """The forward of an adapted layer; what LoRALinear casts at every call is cast here."""
    A, B = adapter.lora_A.detach().to(dtype), adapter.lora_B.detach().to(dtype)

    def forward(x):
        y = adapter.base(x)
        return lora.AddLowRank.apply(x, y, None, None, A, B, adapter.scale) if adapter.enabled else y

    return forward
