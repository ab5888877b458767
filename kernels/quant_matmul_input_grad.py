"""dx = dy @ W for weights packed in blocks of 32 columns: the input gradient of quant_matmul.

A tile of W is dequantized in registers, rounded to dy's dtype as a stored copy of it would be, and
multiplied; rows of W are walked upwards. Bound by the products: a tile of codes is decoded once
for every 128 rows of dy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .linear import tile_of_program
from .quant_format import row_blocks
from .triton_compat import cast, dot


@triton.jit
def block_values(data_ptr, scales_ptr, rows, cols, mask, n_blocks, FORMAT: tl.constexpr):
    """float32 values of W at rows[BN] and cols[BK]: [BN, BK]; 0 where mask is false."""
    block = rows.to(tl.int64)[:, None] * n_blocks + (cols // 32)[None, :]
    within = (cols % 32)[None, :]
    if FORMAT == "q8_0":
        code = tl.load(data_ptr + block * 32 + within, mask=mask, other=0).to(tl.int8, bitcast=True)
        code = code.to(tl.float32)
    else:
        pair = tl.load(data_ptr + block * 16 + within % 16, mask=mask, other=0).to(tl.int32)
        code = ((pair >> (within // 16 * 4)) & 0xF).to(tl.float32)
        if FORMAT == "q4_0":
            code -= 8.0
    if FORMAT == "q4_1":
        value = code * tl.load(scales_ptr + block * 2, mask=mask, other=0.0).to(tl.float32)
        return value + tl.load(scales_ptr + block * 2 + 1, mask=mask, other=0.0).to(tl.float32)
    else:
        return code * tl.load(scales_ptr + block, mask=mask, other=0.0).to(tl.float32)


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
    n_blocks,
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
        live = rows < N - n
        dy = tl.load(dy_rows + n, mask=mask_m & live[None, :], other=0.0)
        mask = mask_k & live[:, None]
        w = block_values(data_ptr, scales_ptr, n + rows, cols, mask, n_blocks, FORMAT)
        acc = dot(dy, cast(w, dy.dtype), acc)
    out = dx_ptr + rows_m.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(out, cast(acc, dx_ptr.dtype.element_ty), mask=mask_m & mask_k)


def quant_matmul_input_grad(
    dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    """dx[..., K] = dy @ W in `out_dtype` (default: dy's), contiguous.

    dy[..., N]: f32 or bf16; data, scales: W packed as `format` ("q4_0", "q4_1", "q8_0"; layouts in
    `quant_format`). Raises ValueError for a format or layout not served.
    """
    n_blocks = row_blocks(data, format)
    n, k = dy.shape[-1], n_blocks * 32
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
        n_blocks,
        FORMAT=format,
        BLOCK_K=tile.n,
        BLOCK_M=tile.m,
        BLOCK_N=tile.k,
        GROUP=tuning.TILE_GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
    return dx
