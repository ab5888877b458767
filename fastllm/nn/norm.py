"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllm.ops.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """`weight` is [size], float32 or bfloat16, as the file has it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Norm of x [..., size], in `out_dtype` or the dtype of x."""
        return rms_norm(x, self.weight, self.eps, out_dtype)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + x in the dtype of x, residual + x in float32)."""
        return add_rms_norm(x, residual, self.weight, self.eps)
