"""SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllm.nn.linear import Linear, ParallelLinear, active, packed_product
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.swiglu import swiglu

# Rows from which the product of quantized gate and up goes on with the activation, on a CPU. CPU
# time on one Zen 5 core, 576 x 3072 of Q4_1, mode int8, fused / apart: 64 rows 0.449 / 0.467 ms,
# 512 rows 2.94 / 3.13 ms; prefill of 512 tokens 274 / 293 ms. One row is bound by reading the
# weight, and two streams of it are no faster than one: 64 decode steps 219 / 216 ms.
FUSED_FROM = 16


class MLP(nn.Module):
    """Gate and up run as one product where they are packed together."""

    def __init__(
        self, hidden: int, inner: int, *, bias: bool = False, activation: str = "bf16"
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner, bias, activation)
        self.up_proj = Linear(hidden, inner, bias, activation)
        self.down_proj = Linear(inner, hidden, bias, activation)
        self.gate_up = ParallelLinear((self.gate_proj, self.up_proj), ("gate_proj", "up_proj"))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.down_proj(self._gated(x))

    def _gated(self, x: Tensor) -> Tensor:
        """silu(gate(x)) * up(x) [T, inner]; the bits do not depend on how."""
        group = self.gate_up
        packed = group.packed
        if (
            packed is None
            or QUANT_FORMATS[packed.format].dense
            or x.shape[0] < FUSED_FROM
            or x.device.type != "cpu"
            or torch.is_grad_enabled()  # the backward pass would compute the product again
            or any(active(member) is not None for member in group.members)
        ):
            gate, up = group(x)
            return swiglu(gate, up)
        return packed_product(x, packed, group.bias, self.gate_proj.activation, None, gated="silu")
