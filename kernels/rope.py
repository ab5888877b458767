"""Rotary position embedding in the half-split layout of Hugging Face. Memory-bound.

y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin for the halves (x1, x2) of the first R dimensions, in
fp32 and rounded once; dimensions from R on pass through.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_compat import cast


@triton.jit
def rope_kernel(
    y_ptr,
    x_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    stride_xt,
    stride_xh,
    H,
    D,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    cols = tl.arange(0, BLOCK_HALF)
    live = heads[:, None] < H
    mask = live & (cols < HALF)[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + cols, mask=cols < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + cols, mask=cols < HALF, other=0.0)[None, :]

    x_rows = x_ptr + token * stride_xt + heads[:, None] * stride_xh
    y_rows = y_ptr + token * H * D + heads[:, None] * D
    x1 = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_rows + HALF + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_rows + cols[None, :], cast(x1 * cos - x2 * sin, y_ptr.dtype.element_ty), mask=mask)
    tl.store(
        y_rows + HALF + cols[None, :], cast(x2 * cos + x1 * sin, y_ptr.dtype.element_ty), mask=mask
    )
    if BLOCK_REST > 0:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        keep = live & (rest < D)
        tl.store(y_rows + rest, tl.load(x_rows + rest, mask=keep, other=0.0), mask=keep)


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y[T, H, D], contiguous: x with its first R = 2 * cos.shape[1] dimensions rotated.

    x[T, H, D]: f32 or bf16, any strides of T and H; positions[T]: int32 or int64;
    cos, sin [max_position, R/2]: f32, contiguous. A position must be below max_position.
    """
    n_tokens, n_heads, dim = x.shape
    half = cos.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rest = dim - 2 * half
    block_h = min(triton.next_power_of_2(n_heads), 32)
    rope_kernel[(n_tokens, triton.cdiv(n_heads, block_h))](
        y,
        x,
        positions,
        cos,
        sin,
        x.stride(0),
        x.stride(1),
        n_heads,
        dim,
        HALF=half,
        BLOCK_H=block_h,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )
    return y
