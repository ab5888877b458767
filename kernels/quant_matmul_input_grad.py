"""dx = dy @ W for packed weights: the input gradient of quant_matmul.

A tile of W is dequantized in registers, rounded to dy's dtype as a stored copy of it would be, and
multiplied; rows of W are walked upwards. Bound by the products: a tile of codes is decoded once
for every 128 rows of dy, and a scale is loaded once for the 32 columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .linear import tile_of_program
from .quant_format import block_values, check_rows, kernel_format, weight_rows
from .triton_compat import cast, dot


@triton.jit
def weight_tile(
    data_ptr,
    scales_ptr,
    rows,
    first_block,
    N,
    n_blocks,
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Values of W[rows, COLUMNS columns from a block on] in dtype; 0 outside."""
    block = first_block + tl.arange(0, COLUMNS // 32)
    data_rows, scale_rows = weight_rows(data_ptr, scales_ptr, rows, n_blocks, FORMAT)
    values = block_values(data_rows, scale_rows, block, rows < N, block < n_blocks, FORMAT)
    return cast(values.reshape(rows.shape[0], COLUMNS), dtype)


@triton.jit
def quant_matmul_input_grad_kernel(
    dx_ptr,
    dy_ptr,
    data_ptr,
    scales_ptr,
    stride_dy,
    M,
    N,
    K,
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_k, tile_m = tile_of_program(
        tl.program_id(0), tl.cdiv(K, BLOCK_K), tl.cdiv(M, BLOCK_M), GROUP
    )
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.arange(0, BLOCK_N)
    dy_rows = dy_ptr + rows_m.to(tl.int64)[:, None] * stride_dy + rows[None, :]
    mask_k, mask_m = (cols < K)[None, :], (rows_m < M)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        dy = tl.load(dy_rows + n, mask=mask_m & (rows < N - n)[None, :], other=0.0)
        w = weight_tile(
            data_ptr, scales_ptr, n + rows, tile_k * (BLOCK_K // 32), N, K // 32,
            FORMAT, BLOCK_K, dy.dtype,
        )  # fmt: skip
        acc = dot(dy, w, acc)
    out = dx_ptr + rows_m.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(out, cast(acc, dx_ptr.dtype.element_ty), mask=mask_m & mask_k)


def quant_matmul_input_grad(
    dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    """dx[..., K] = dy @ W in `out_dtype` (default: dy's), contiguous.

    dy[..., N]: f32 or bf16; data, scales: W packed as `format` (one of `quant_format.FORMATS`).
    Raises ValueError for a format or layout not served.
    """
    n, k = dy.shape[-1], check_rows(data, format) * 32
    dx = torch.empty((*dy.shape[:-1], k), dtype=out_dtype or dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    dy2 = dy.reshape(dx.numel() // k, n)
    if dy2.stride(-1) != 1:
        dy2 = dy2.contiguous()
    m = dy2.shape[0]
    tile = tuning.INPUT_GRAD_FP32 if dy.dtype == torch.float32 else tuning.INPUT_GRAD_BF16
    quant_matmul_input_grad_kernel[(triton.cdiv(k, tile.n) * triton.cdiv(m, tile.m),)](
        dx,
        dy2,
        data,
        scales,
        dy2.stride(0),
        m,
        n,
        k,
        FORMAT=kernel_format(format),
        BLOCK_K=tile.n,
        BLOCK_M=tile.m,
        BLOCK_N=tile.k,
        GROUP=tuning.TILE_GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
    return dx
