"""y = x @ W.T + bias for weights that stay packed in blocks of 32 columns.

One tile product per block, its scale applied once, blocks in ascending K, one fp32 accumulator:
    int8 activations: s = exact int32 sum of code * q;          acc = fma(s, d * dx, acc)
    bf16 or fp32:     t = fp32 dot of x with the unscaled code; acc = fma(t, d, acc)
    q4_1 also:        x_sum = sum of the block's x (dx * q);    acc = fma(m, x_sum, acc)
Codes are exact in int8 and bf16, so a dequantized weight is never rounded. Orientation and
independence of the number of rows are those of `linear`: weights are the long side of the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .linear import linear, store_outputs, sum_splits, tile_of_program
from .quant_blocks import activation_block, add_block
from .quant_format import dense_rows, row_blocks
from .triton_compat import divide, round_even


@triton.jit
def quantize_activation_kernel(
    q_ptr,
    scales_ptr,
    sums_ptr,
    x_ptr,
    stride_xm,
    n_blocks,
    INT8: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    live = blocks < n_blocks
    slot = tl.arange(0, 32)
    if PAIRED:  # slot 2j holds column j and slot 2j + 1 column 16 + j: a 4-bit block's byte order
        cols = (slot % 2) * 16 + slot // 2
    else:
        cols = slot
    offsets = blocks[:, None] * 32 + cols[None, :]
    x = tl.load(x_ptr + row * stride_xm + offsets, mask=live[:, None], other=0.0).to(tl.float32)
    out = row * n_blocks + blocks
    if INT8:
        amax = tl.max(tl.abs(x), axis=1)
        safe = tl.where(amax > 0, amax, 127.0)
        scale = divide(amax, tl.full(amax.shape, 127.0, tl.float32))
        inverse = divide(tl.full(amax.shape, 127.0, tl.float32), safe)
        q = round_even(x * inverse[:, None]).to(tl.int32)
        tl.store(q_ptr + out[:, None] * 32 + slot[None, :], q.to(tl.int8), mask=live[:, None])
        tl.store(scales_ptr + out, scale, mask=live)
        tl.store(sums_ptr + out, scale * tl.sum(q, axis=1).to(tl.float32), mask=live)
    else:
        tl.store(sums_ptr + out, tl.sum(x, axis=1), mask=live)


@triton.jit
def quant_matmul_kernel(
    y_ptr,
    x_ptr,
    data_ptr,
    scales_ptr,
    sums_ptr,
    bias_ptr,
    stride_xm,
    M,
    N,
    n_blocks,
    blocks_per_split,
    FORMAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_n, tile_m = tile_of_program(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP
    )
    split = tl.program_id(1)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_blocks_n = rows_n.to(tl.int64) * n_blocks
    row_blocks_m = rows_m.to(tl.int64) * n_blocks
    x_rows = x_ptr + rows_m.to(tl.int64) * stride_xm

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    end = tl.minimum(n_blocks, (split + 1) * blocks_per_split)
    for b0 in range(split * blocks_per_split, end, BLOCKS):
        for i in tl.static_range(BLOCKS):
            b = b0 + i
            mask_n, mask_m = (rows_n < N) & (b < end), (rows_m < M) & (b < end)
            x = activation_block(
                x_rows + b * 32, sums_ptr, sums_ptr, row_blocks_m + b, mask_m, FORMAT, False
            )
            acc = add_block(acc, x, data_ptr, scales_ptr, row_blocks_n + b, mask_n, FORMAT, False)
    y_split = y_ptr + split.to(tl.int64) * M * N
    store_outputs(y_split, acc, bias_ptr, rows_m, rows_n, M, N, HAS_BIAS)


@triton.jit
def quant_matmul_int8_kernel(
    y_ptr,
    q_ptr,
    q_scales_ptr,
    q_sums_ptr,
    data_ptr,
    scales_ptr,
    bias_ptr,
    M,
    N,
    n_blocks,
    blocks_per_split,
    FORMAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_n, tile_m = tile_of_program(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP
    )
    split = tl.program_id(1)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_blocks_n = rows_n.to(tl.int64) * n_blocks
    row_blocks_m = rows_m.to(tl.int64) * n_blocks

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    end = tl.minimum(n_blocks, (split + 1) * blocks_per_split)
    for b0 in range(split * blocks_per_split, end, BLOCKS):
        for i in tl.static_range(BLOCKS):
            b = b0 + i
            mask_n, mask_m = (rows_n < N) & (b < end), (rows_m < M) & (b < end)
            q_rows = q_ptr + (row_blocks_m + b) * 32
            x = activation_block(
                q_rows, q_scales_ptr, q_sums_ptr, row_blocks_m + b, mask_m, FORMAT, True
            )
            acc = add_block(acc, x, data_ptr, scales_ptr, row_blocks_n + b, mask_n, FORMAT, True)
    y_split = y_ptr + split.to(tl.int64) * M * N
    store_outputs(y_split, acc, bias_ptr, rows_m, rows_n, M, N, HAS_BIAS)


def quantize_activation(
    x: Tensor, paired: bool, int8: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 [M, K], dx f32 [M, K/32], sums f32 [M, K/32]) of x[M, K] in blocks of 32 columns.

    dx = amax / 127, q = round(x * (127 / amax)) to even; sums = dx * sum(q). `paired` interleaves
    each block's halves, as 4-bit codes are packed. `int8=False` gives only the sums of x itself
    (q and dx empty).
    """
    m, k = x.shape
    n_blocks = k // 32
    f32 = {"dtype": torch.float32, "device": x.device}
    q = torch.empty((m, k) if int8 else (0,), dtype=torch.int8, device=x.device)
    scales = torch.empty((m, n_blocks) if int8 else (0,), **f32)
    sums = torch.empty((m, n_blocks), **f32)
    blocks = min(triton.next_power_of_2(n_blocks), tuning.ELEMENTWISE_BLOCK // 32)
    quantize_activation_kernel[(m, triton.cdiv(n_blocks, blocks))](
        q,
        scales,
        sums,
        x,
        x.stride(0),
        n_blocks,
        INT8=int8,
        PAIRED=paired,
        BLOCKS=blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return q, scales, sums


def quant_matmul(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None = None,
    activation: str = "bf16",
    out_dtype: torch.dtype | None = None,
    *,
    batch_invariant: bool = True,
) -> Tensor:
    """y[..., n] = x @ W.T + bias in `out_dtype` (default: x's), contiguous.

    x[..., K]: f32 or bf16; data, scales: W packed as `format` ("q4_0", "q4_1", "q8_0", "bf16",
    "f32"; layouts in `quant_format`); activation: "int8", "bf16" (x bf16) or "fp32" (x f32),
    ignored by the dense formats. Raises ValueError for a format, layout or mode not served.
    """
    if format in ("bf16", "f32"):
        weight = dense_rows(data, format)[:n, : x.shape[-1]]
        return linear(x, weight, bias, out_dtype, batch_invariant=batch_invariant)
    if activation not in ("int8", "bf16", "fp32"):
        raise ValueError(f"activation {activation!r} is not one of int8, bf16, fp32")
    n_blocks = row_blocks(data, format)
    y = torch.empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x2 = x.reshape(-1, x.shape[-1])
    m = x2.shape[0]
    tile = tuning.quant_tile(m, activation)
    n_programs = triton.cdiv(n, tile.n) * triton.cdiv(m, tile.m)
    n_splits = 1
    if not batch_invariant:
        n_splits = tuning.k_splits(n_programs, m, n_blocks * 32, tile.k)
    out = y if n_splits == 1 else y.new_empty((n_splits, m, n), dtype=torch.float32)
    sizes = (m, n, n_blocks, triton.cdiv(n_blocks, n_splits))
    options = {
        "FORMAT": format,
        "HAS_BIAS": bias is not None and n_splits == 1,
        "BLOCK_N": tile.n,
        "BLOCK_M": tile.m,
        "BLOCKS": tile.k // 32,
        "GROUP": tuning.TILE_GROUP,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    bias_or_any = scales if bias is None else bias
    if activation == "int8":
        q, q_scales, q_sums = quantize_activation(x2, paired=format != "q8_0")
        quant_matmul_int8_kernel[(n_programs, n_splits)](
            out, q, q_scales, q_sums, data, scales, bias_or_any, *sizes, **options
        )
    else:
        sums = scales
        if format == "q4_1":
            sums = quantize_activation(x2, paired=False, int8=False)[2]
        quant_matmul_kernel[(n_programs, n_splits)](
            out, x2, data, scales, sums, bias_or_any, x2.stride(0), *sizes, **options
        )
    if n_splits > 1:
        sum_splits(y, out, bias)
    return y
