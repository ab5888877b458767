"""Gated activations: act(gate) * up, in fp32 and rounded once. Memory-bound."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .moe_activation import activate
from .triton_compat import cast


@triton.jit
def swiglu_kernel(
    y_ptr,
    gate_ptr,
    up_ptr,
    stride_gm,
    stride_um,
    n_cols,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    gate = tl.load(gate_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
    y = activate(gate, up, ACTIVATION)
    tl.store(y_ptr + row * n_cols + cols, cast(y, y_ptr.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """y[..., I] = act(gate) * up in gate's dtype, contiguous.

    gate, up [..., I]: f32 or bf16, last dimension contiguous; both may be views of one [..., 2I].
    activation: one of `moe_activation.ACTIVATIONS`.
    """
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    n_cols = gate.shape[-1]
    gate2, up2 = gate.reshape(-1, n_cols), up.reshape(-1, n_cols)
    block = min(triton.next_power_of_2(n_cols), tuning.ELEMENTWISE_BLOCK)
    swiglu_kernel[(gate2.shape[0], triton.cdiv(n_cols, block))](
        y,
        gate2,
        up2,
        gate2.stride(0),
        up2.stride(0),
        n_cols,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=4,
    )
    return y
