"""y = base + scale * (t @ b.T), the last product of a low-rank adapter: fp32 sum, one rounding.

Bound by the bytes of base and y: the rank is a few steps of the matrix instruction. The tile is
that of `linear` (rows of b the long side), one size for every number of rows, so a row's bits
depend on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .linear import tile_of_program
from .triton_compat import cast, dot


@triton.jit
def lora_add_kernel(
    y_ptr,
    t_ptr,
    b_ptr,
    base_ptr,
    stride_tm,
    stride_bn,
    stride_base,
    M,
    N,
    R,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_n, tile_m = tile_of_program(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP
    )
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_R)
    b_rows = b_ptr + rows_n.to(tl.int64)[:, None] * stride_bn + cols[None, :]
    t_rows = t_ptr + rows_m.to(tl.int64)[None, :] * stride_tm + cols[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        live = cols < R - r
        b = tl.load(b_rows + r, mask=(rows_n < N)[:, None] & live[None, :], other=0.0)
        t = tl.load(t_rows + r, mask=(rows_m < M)[None, :] & live[:, None], other=0.0)
        acc = dot(b, t, acc)
    mask = (rows_m < M)[:, None] & (rows_n < N)[None, :]
    rows = rows_m.to(tl.int64)[:, None]
    base = tl.load(base_ptr + rows * stride_base + rows_n[None, :], mask=mask, other=0.0)
    y = cast(base + scale * tl.trans(acc), y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows * N + rows_n[None, :], y, mask=mask)


def lora_add(
    t: Tensor, b: Tensor, base: Tensor, scale: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """y[..., N] = base + scale * (t @ b.T) in `out_dtype` (default: t's), contiguous.

    t[..., R], b[N, R]: both f32 or both bf16; base[..., N]: f32; last dimensions contiguous.
    """
    n, r = b.shape
    y = torch.empty((*t.shape[:-1], n), dtype=out_dtype or t.dtype, device=t.device)
    if y.numel() == 0:
        return y
    t2, base2 = t.reshape(y.numel() // n, r), base.reshape(-1, n)
    m = t2.shape[0]
    tile = tuning.LORA_TILE
    lora_add_kernel[(triton.cdiv(n, tile.n) * triton.cdiv(m, tile.m),)](
        y,
        t2,
        b,
        base2,
        t2.stride(0),
        b.stride(0),
        base2.stride(0),
        m,
        n,
        r,
        scale,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_R=tile.k,
        GROUP=tuning.TILE_GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
    return y
