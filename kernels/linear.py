"""y = x @ weight.T + bias for dense weights, fp32 accumulation, one rounding.

The tile product is weight[BLOCK_N, BLOCK_K] @ x[BLOCK_M, BLOCK_K].T: the weight's rows are the
long side of the matrix instruction (64 for Hopper's wgmma, 16 for mma.sync), the tokens its short
side (8 and up). So a single token and a full prompt run the same instruction, each output has one
fp32 accumulator, and K is walked upwards in the instruction's own steps (16 for bf16) whatever
the tile: a row's bits depend neither on how many rows there are nor on which tile holds it.
`batch_invariant=False` may split K over programs for few rows: partial sums are still added in
order, so results repeat, but they depend on the number of rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_compat import cast, dot


def columns_contiguous(t: Tensor) -> Tensor:
    """t, or a copy where its columns do not lie side by side, as kernels read them."""
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


@triton.jit
def tile_of_program(pid, n_tiles_n, n_tiles_m, GROUP: tl.constexpr):
    """(weight tile, token tile): GROUP weight tiles stay in L2 while the token tiles pass by."""
    group = pid // (GROUP * n_tiles_m)
    first = group * GROUP
    size = tl.minimum(n_tiles_n - first, GROUP)
    within = pid % (GROUP * n_tiles_m)
    return first + within % size, within // size


@triton.jit
def store_outputs(y_ptr, acc, bias_ptr, rows_m, rows_n, M, N, HAS_BIAS: tl.constexpr):
    """Stores acc[BLOCK_N, BLOCK_M] (fp32) plus bias as y[M, N], rounded once."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n, mask=rows_n < N, other=0.0).to(tl.float32)[:, None]
    y = cast(tl.trans(acc), y_ptr.dtype.element_ty)
    mask = (rows_m < M)[:, None] & (rows_n < N)[None, :]
    tl.store(y_ptr + rows_m.to(tl.int64)[:, None] * N + rows_n[None, :], y, mask=mask)


@triton.jit
def linear_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    stride_xm,
    stride_wn,
    M,
    N,
    K,
    k_per_split,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_n, tile_m = tile_of_program(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP
    )
    split = tl.program_id(1)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + rows_n.to(tl.int64)[:, None] * stride_wn + cols[None, :]
    x_rows = x_ptr + rows_m.to(tl.int64)[None, :] * stride_xm + cols[:, None]
    mask_n, mask_m = (rows_n < N)[:, None], (rows_m < M)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    k_end = tl.minimum(K, (split + 1) * k_per_split)
    for k in range(split * k_per_split, k_end, BLOCK_K):
        if EVEN_K:
            w = tl.load(weight_rows + k, mask=mask_n, other=0.0)
            x = tl.load(x_rows + k, mask=mask_m, other=0.0)
        else:
            w = tl.load(weight_rows + k, mask=mask_n & (cols < k_end - k)[None, :], other=0.0)
            x = tl.load(x_rows + k, mask=mask_m & (cols < k_end - k)[:, None], other=0.0)
        acc = dot(w, x, acc)
    y_split = y_ptr + split.to(tl.int64) * M * N
    store_outputs(y_split, acc, bias_ptr, rows_m, rows_n, M, N, HAS_BIAS)


@triton.jit
def sum_splits_kernel(
    y_ptr,
    partial_ptr,
    bias_ptr,
    M,
    N,
    N_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(N_SPLITS):
        acc += tl.load(partial_ptr + (split * M + row) * N + cols, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + cols, cast(acc, y_ptr.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    batch_invariant: bool = True,
) -> Tensor:
    """y[..., N] = x @ weight.T + bias in `out_dtype` (default: x's), contiguous.

    x[..., K], weight[N, K]: both f32 or both bf16; bias[N]: any float.
    """
    n, k = weight.shape
    weight = columns_contiguous(weight)
    bias = bias if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x2 = columns_contiguous(x.reshape(math.prod(x.shape[:-1]), k))
    m = x2.shape[0]
    tile = tuning.linear_tile(m, x.dtype)
    n_programs = triton.cdiv(n, tile.n) * triton.cdiv(m, tile.m)
    n_splits = 1 if batch_invariant else tuning.k_splits(n_programs, m, k, tile.k)
    k_per_split = triton.cdiv(triton.cdiv(k, n_splits), tile.k) * tile.k
    out = y if n_splits == 1 else y.new_empty((n_splits, m, n), dtype=torch.float32)
    linear_kernel[(n_programs, n_splits)](
        out,
        x2,
        weight,
        weight if bias is None else bias,
        x2.stride(0),
        weight.stride(0),
        m,
        n,
        k,
        k_per_split,
        HAS_BIAS=bias is not None and n_splits == 1,
        EVEN_K=k % tile.k == 0,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        GROUP=tuning.TILE_GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if n_splits > 1:
        sum_splits(y, out, bias)
    return y


def sum_splits(y: Tensor, partial: Tensor, bias: Tensor | None) -> None:
    """y[..., N] = sum over splits of partial[splits, M, N], in order, plus bias; rounded once."""
    n_splits, m, n = partial.shape
    block = min(triton.next_power_of_2(n), tuning.ELEMENTWISE_BLOCK)
    sum_splits_kernel[(m, triton.cdiv(n, block))](
        y,
        partial,
        partial if bias is None else bias,
        m,
        n,
        N_SPLITS=n_splits,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=4,
    )
