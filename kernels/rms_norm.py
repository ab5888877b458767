"""RMSNorm over the last dimension, alone or behind the residual add. Memory-bound.

y = x * rsqrt(mean(x^2) + eps) * weight, statistics in fp32, one rounding at the store. A row is
reduced by one program in an order that only N decides, so it never depends on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_compat import cast, rsqrt


@triton.jit
def rms_norm_kernel(
    y_ptr,
    h_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    stride_x0,
    stride_x1,
    stride_r0,
    stride_r1,
    n_rows,
    n_inner,
    N,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < N)[None, :]
    outer, inner = rows // n_inner, rows % n_inner
    x_offsets = (outer * stride_x0 + inner * stride_x1)[:, None] + cols[None, :]
    y_offsets = (rows * N)[:, None] + cols[None, :]

    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r_offsets = (outer * stride_r0 + inner * stride_r1)[:, None] + cols[None, :]
        x += tl.load(residual_ptr + r_offsets, mask=mask, other=0.0)
        tl.store(h_ptr + y_offsets, x, mask=mask)
    rstd = rsqrt(tl.sum(x * x, axis=1) / N + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + y_offsets, cast(y, y_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """y[..., N] = x / rms(x) * weight, contiguous, in `out_dtype` (default: x's).

    x: f32 or bf16, last dimension contiguous, the others of any stride; weight[N]: f32 or bf16.
    Raises ValueError when a row does not fit one program (N above 65,536).
    """
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    _launch(y, y, x, x, weight, eps, has_residual=False)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, h): h = residual + x in fp32, y = rms_norm(h) in x's dtype, both contiguous.

    x[..., N]: f32 or bf16; residual[..., N]: f32; weight[N]. Raises ValueError as `rms_norm`.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _launch(y, h, x, residual, weight, eps, has_residual=True)
    return y, h


def _launch(
    y: Tensor,
    h: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    has_residual: bool,
) -> None:
    n = x.shape[-1]
    n_rows = x.numel() // n if n else 0
    if n_rows == 0:
        return
    tile = tuning.row_tile(n)
    x3, r3 = _rows(x), _rows(residual)
    rms_norm_kernel[(triton.cdiv(n_rows, tile.rows),)](
        y,
        h,
        x3,
        r3,
        weight,
        x3.stride(0),
        x3.stride(1),
        r3.stride(0),
        r3.stride(1),
        n_rows,
        x3.shape[1],
        n,
        eps,
        HAS_RESIDUAL=has_residual,
        BLOCK_ROWS=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.num_warps,
    )


def _rows(x: Tensor) -> Tensor:
    """x as [outer, inner, N]: a view unless the leading dimensions cannot be merged."""
    if x.dim() == 1:
        return x.view(1, 1, -1)
    return x.reshape(-1, x.shape[-2], x.shape[-1])
