"""Twin of sampling.generate for a CPU: weights are packed once, in the order in which oneDNN multiplies few rows.

A plain product of few rows spends much of its time on reordering the weight, again at every token. The
price is a copy of the weights while sampling.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from socratiq import sampling


def generate(policy, prompts: list[list[int]], uniforms, eos_id: int, temperature: float) -> list[list[int]]:
    """sampling.generate with packed weights."""
    with packed(policy.lm, rows=len(prompts) * uniforms.shape[1]):
        return sampling.generate(policy, prompts, uniforms, eos_id, temperature)


@contextlib.contextmanager
def packed(lm: nn.Module, rows: int):
    """Inside, linear layers multiply by packed weights, made for `rows` rows at a time. No gradients pass."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else next(lm.parameters()).dtype
    linears = [x for x in lm.modules() if type(x) is nn.Linear and can_pack(x.weight, dtype)]
    for linear in linears:
        linear.forward = packed_forward(linear, rows, dtype)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def can_pack(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether this weight lies on a CPU whose PyTorch multiplies by oneDNN in that precision."""
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":  # a part of several processes' is no Parameter
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_forward(linear: nn.Linear, rows: int, dtype: torch.dtype):
    """The forward of a linear layer by the operators that torch.compile uses."""
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")
