"""Gradients of gated activations, side by side, in fp32 and rounded once. Memory-bound."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .moe_activation import activation_gradients
from .triton_compat import cast


@triton.jit
def swiglu_backward_kernel(
    both_ptr,
    dy_ptr,
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
    dy = tl.load(dy_ptr + row * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
    _, by_gate, by_up = activation_gradients(gate, up, ACTIVATION)
    both = both_ptr + row * 2 * n_cols + cols
    tl.store(both, cast(dy * by_gate, both_ptr.dtype.element_ty), mask=mask)
    tl.store(both + n_cols, cast(dy * by_up, both_ptr.dtype.element_ty), mask=mask)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """[..., 2I] in gate's dtype, contiguous: the gradient of gate, then that of up.

    dy, gate, up [..., I]: f32 or bf16, last dimension contiguous, dy contiguous; gate and up may
    be views of one [..., 2I]. activation: one of `moe_activation.ACTIVATIONS`.
    """
    n_cols = gate.shape[-1]
    both = torch.empty((*gate.shape[:-1], 2 * n_cols), dtype=gate.dtype, device=gate.device)
    if both.numel() == 0:
        return both
    gate2, up2 = gate.reshape(-1, n_cols), up.reshape(-1, n_cols)
    block = min(triton.next_power_of_2(n_cols), tuning.ELEMENTWISE_BLOCK)
    swiglu_backward_kernel[(gate2.shape[0], triton.cdiv(n_cols, block))](
        both,
        dy.contiguous(),
        gate2,
        up2,
        gate2.stride(0),
        up2.stride(0),
        n_cols,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=4,
    )
    return both
