"""SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor, nn

from fastllm.nn.linear import Linear, ParallelLinear
from fastllm.ops.swiglu import swiglu


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
        gate, up = self.gate_up(x)
        return self.down_proj(swiglu(gate, up))
