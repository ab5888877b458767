"""Gradients of RMSNorm, of the residual sum before it and of its weight. Memory-bound.

With n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g * n)) [+ dh] and
dweight = sum(dy * n). A program takes a run of rows, whose length the width alone decides, and
writes its own sum for dweight; a second kernel adds those in order: no atomics, and the bits do not
depend on what ran first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_compat import cast, rsqrt


@triton.jit
def rms_norm_backward_kernel(
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    dy_ptr,
    dh_ptr,
    x_ptr,
    weight_ptr,
    stride_x0,
    stride_x1,
    n_rows,
    n_inner,
    N,
    eps,
    HAS_DX: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in range(TILES):
        rows = (program * TILES + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (rows < n_rows)[:, None] & (cols < N)[None, :]
        outer, inner = rows // n_inner, rows % n_inner
        x_offsets = (outer * stride_x0 + inner * stride_x1)[:, None] + cols[None, :]
        offsets = (rows * N)[:, None] + cols[None, :]
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = rsqrt(tl.sum(x * x, axis=1) / N + eps)[:, None]
        # Read again for every tile: kept, it would be a fifth of a row's registers.
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        n, g = x * rstd, dy * weight
        dx = rstd * (g - n * (tl.sum(g * n, axis=1) / N)[:, None])
        if HAS_DWEIGHT:
            sums += tl.sum(dy * n, axis=0)
        if HAS_DH:
            dx += tl.load(dh_ptr + offsets, mask=mask, other=0.0)
        if HAS_DRESIDUAL:
            tl.store(dresidual_ptr + offsets, dx, mask=mask)
        if HAS_DX:
            tl.store(dx_ptr + offsets, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    if HAS_DWEIGHT:
        tl.store(partial_ptr + program * N + cols, sums, mask=cols < N)


@triton.jit
def rms_norm_backward_wide_kernel(
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    dy_ptr,
    dh_ptr,
    x_ptr,
    weight_ptr,
    stride_x0,
    stride_x1,
    n_rows,
    n_inner,
    N,
    eps,
    HAS_DX: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same for rows that registers do not hold: read twice, the second time from L2."""
    program = tl.program_id(0).to(tl.int64)
    for tile in range(TILES):
        row = program * TILES + tile
        x_row = x_ptr + row // n_inner * stride_x0 + row % n_inner * stride_x1
        squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
        products = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(0, N, BLOCK_N):
            cols = first + tl.arange(0, BLOCK_N)
            mask = (cols < N) & (row < n_rows)
            x = tl.load(x_row + cols, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            squares += x * x
            products += dy * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) * x
        rstd = rsqrt(tl.sum(squares, axis=0) / N + eps)
        mean = tl.sum(products, axis=0) * rstd / N
        for first in range(0, N, BLOCK_N):
            cols = first + tl.arange(0, BLOCK_N)
            mask = (cols < N) & (row < n_rows)
            at = row * N + cols
            n = tl.load(x_row + cols, mask=mask, other=0.0).to(tl.float32) * rstd
            dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            dx = rstd * (dy * weight - n * mean)
            if HAS_DWEIGHT:
                partial = partial_ptr + program * N + cols
                before = tl.load(partial, mask=mask & (tile > 0), other=0.0)
                tl.store(partial, before + dy * n, mask=mask)
            if HAS_DH:
                dx += tl.load(dh_ptr + at, mask=mask, other=0.0)
            if HAS_DRESIDUAL:
                tl.store(dresidual_ptr + at, dx, mask=mask)
            if HAS_DX:
                tl.store(dx_ptr + at, cast(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def column_sums_kernel(
    out_ptr, partial_ptr, n_rows, N, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, n_rows, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        mask = (rows < n_rows)[:, None] & (cols < N)[None, :]
        offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
        sums += tl.sum(tl.load(partial_ptr + offsets, mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + cols, cast(sums, out_ptr.dtype.element_ty), mask=cols < N)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dweight_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of `rms_norm`: dx in x's dtype, contiguous; dweight in the dtype given.

    dy[..., N]: f32 or bf16, contiguous; x: last dimension contiguous, the others of any stride;
    dweight_dtype None: dweight has no elements.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, _launch(dx, None, dy, None, x, weight, eps, dweight_dtype)


def add_rms_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight) of `add_rms_norm`, dresidual in f32 and dx its rounding.

    dh: f32 gradient of the residual stream after the sum, or None; h: that stream. A dtype of None:
    that gradient has no elements.
    """
    dx = None if dx_dtype is None else torch.empty(h.shape, dtype=dx_dtype, device=h.device)
    dresidual = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    dweight = _launch(dx, dresidual, dy, dh, h, weight, eps, dweight_dtype)
    return h.new_empty(0) if dx is None else dx, dresidual, dweight


def _launch(
    dx: Tensor | None,
    dresidual: Tensor | None,
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    dweight_dtype: torch.dtype | None,
) -> Tensor:
    n = x.shape[-1]
    n_rows = x.numel() // n if n else 0
    wide = n > tuning.NORM_GRADIENT_COLUMNS
    tile = tuning.row_tile(min(n, tuning.NORM_GRADIENT_COLUMNS))
    programs = triton.cdiv(n_rows, tile.rows * tuning.NORM_GRADIENT_TILES)
    wanted = dweight_dtype is not None
    partial = torch.empty((programs if wanted else 0, n), dtype=torch.float32, device=x.device)
    if n_rows:
        x3 = x.view(1, 1, -1) if x.dim() == 1 else x.reshape(-1, x.shape[-2], n)
        kernel = rms_norm_backward_wide_kernel if wide else rms_norm_backward_kernel
        kernel[(programs,)](
            dx,
            dresidual,
            partial,
            dy.contiguous(),
            None if dh is None else dh.contiguous(),
            x3,
            weight,
            x3.stride(0),
            x3.stride(1),
            n_rows,
            x3.shape[1],
            n,
            eps,
            HAS_DX=dx is not None,
            HAS_DRESIDUAL=dresidual is not None,
            HAS_DH=dh is not None,
            HAS_DWEIGHT=wanted,
            TILES=tuning.NORM_GRADIENT_TILES,
            BLOCK_N=tile.columns,
            num_warps=tile.num_warps,
            **({} if wide else {"BLOCK_ROWS": tile.rows}),
        )
    return _column_sums(partial, dweight_dtype) if wanted else partial.view(-1)


def _column_sums(partial: Tensor, dtype: torch.dtype | None) -> Tensor:
    programs, n = partial.shape
    out = torch.empty(n, dtype=dtype, device=partial.device)
    if n:
        column_sums_kernel[(triton.cdiv(n, tuning.COLUMN_SUMS_BLOCK),)](
            out,
            partial,
            programs,
            n,
            BLOCK_ROWS=tuning.COLUMN_SUMS_ROWS,
            BLOCK_N=tuning.COLUMN_SUMS_BLOCK,
            num_warps=4,
        )
    return out
