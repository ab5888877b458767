"""Gradients of experts' weights and biases: sums over an expert's rows, in sorted order.

dW[e] = dy' x over the rows of expert e, in steps of a fixed number of rows, one fp32 accumulator an
element: no atomics, so runs repeat bit for bit. Rows of dy or x may be gathered: those of the token
of each row. An expert without rows has zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe_tuning
from .grouped_matmul import dense_rows
from .moe_plan import token_of_row
from .triton_compat import cast, dot


@triton.jit
def expert_rows(offsets_ptr, expert, n_rows):
    """[begin, end) of an expert's rows, within [0, n_rows)."""
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert), 0), n_rows)
    end = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert + 1), begin), n_rows)
    return begin, end


@triton.jit
def source_rows(slots_ptr, rows, end, n_rows, per_token, GATHERED: tl.constexpr):
    """(row of the tensor, whether it is there) of sorted rows: the row itself, or its token."""
    if GATHERED:
        return token_of_row(slots_ptr, rows, rows < end, n_rows, per_token)
    else:
        return rows.to(tl.int64), rows < end


@triton.jit
def grouped_weight_grad_kernel(
    dweight_ptr,
    dy_ptr,
    x_ptr,
    offsets_ptr,
    slots_ptr,
    stride_dy,
    stride_x,
    n_rows,
    per_token,
    N,
    K,
    GATHER_DY: tl.constexpr,
    GATHER_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    tile = tl.program_id(0) % (tiles_n * tiles_k)
    rows_n = tile // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = expert_rows(offsets_ptr, expert, n_rows)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    rows = begin + tl.arange(0, BLOCK_M)
    row_dy, live_dy = source_rows(slots_ptr, rows, end, n_rows, per_token, GATHER_DY)
    row_x, live_x = source_rows(slots_ptr, rows, end, n_rows, per_token, GATHER_X)
    for first in range(begin, end, BLOCK_M):
        dy_tile = dy_ptr + row_dy[:, None] * stride_dy + rows_n[None, :]
        dy = tl.load(dy_tile, mask=live_dy[:, None] & (rows_n < N)[None, :], other=0.0)
        x_tile = x_ptr + row_x[:, None] * stride_x + cols[None, :]
        x = tl.load(x_tile, mask=live_x[:, None] & (cols < K)[None, :], other=0.0)
        acc = dot(tl.trans(dy), x, acc)
        # One step ahead: a load that waited for another could not be kept in flight.
        rows = first + BLOCK_M + tl.arange(0, BLOCK_M)
        row_dy, live_dy = source_rows(slots_ptr, rows, end, n_rows, per_token, GATHER_DY)
        row_x, live_x = source_rows(slots_ptr, rows, end, n_rows, per_token, GATHER_X)
    out = dweight_ptr + (expert.to(tl.int64) * N + rows_n)[:, None] * K + cols[None, :]
    mask = (rows_n < N)[:, None] & (cols < K)[None, :]
    tl.store(out, cast(acc, dweight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_bias_grad_kernel(
    dbias_ptr,
    dy_ptr,
    offsets_ptr,
    slots_ptr,
    weights_ptr,
    stride_dy,
    n_rows,
    per_token,
    N,
    GATHERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of an expert's rows of dy; gathered ones are tokens' rows times the slots' weights."""
    expert = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = expert_rows(offsets_ptr, expert, n_rows)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        row, live = source_rows(slots_ptr, rows, end, n_rows, per_token, GATHERED)
        tile = dy_ptr + row[:, None] * stride_dy + cols[None, :]
        dy = tl.load(tile, mask=live[:, None] & (cols < N)[None, :], other=0.0).to(tl.float32)
        if GATHERED:
            slot = tl.load(slots_ptr + rows, mask=live, other=0)
            dy *= tl.load(weights_ptr + slot, mask=live, other=0.0)[:, None]
        sums += tl.sum(dy, axis=0)
    out = dbias_ptr + expert.to(tl.int64) * N + cols
    tl.store(out, cast(sums, dbias_ptr.dtype.element_ty), mask=cols < N)


def grouped_weight_grad(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype | None = None,
    slots: Tensor | None = None,
    *,
    gather_dy: bool = False,
    gather_x: bool = False,
) -> Tensor:
    """dweight[E, N, K]: over rows p in [offsets[e], offsets[e + 1]), the sum of dy[p]' x[p].

    In `out_dtype` (default: x's). dy[M, N], x[M, K]: both f32 or both bf16; offsets int32 [E + 1].
    A gathered one has a row for each token, [T, ...], taken for slots int32 [M = T * k].
    """
    dy, x = dense_rows(dy), dense_rows(x)
    n_experts, n, k = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    dweight = torch.empty((n_experts, n, k), dtype=out_dtype or x.dtype, device=dy.device)
    if dweight.numel() == 0:
        return dweight
    n_rows = (x if gather_dy else dy).shape[0]
    n_tokens = (dy if gather_dy else x).shape[0]
    tile = moe_tuning.weight_grad_tile(dy.dtype, dy.device)
    block_k = min(tile.k, max(16, triton.next_power_of_2(k)))  # 1 column: the sum of rows
    grouped_weight_grad_kernel[(n_experts * triton.cdiv(n, tile.n) * triton.cdiv(k, block_k),)](
        dweight,
        dy,
        x,
        offsets,
        offsets if slots is None else slots,
        dy.stride(0),
        x.stride(0),
        n_rows,
        n_rows // max(1, n_tokens),
        n,
        k,
        GATHER_DY=gather_dy,
        GATHER_X=gather_x,
        BLOCK_N=tile.n,
        BLOCK_K=block_k,
        BLOCK_M=tile.m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dweight


def grouped_bias_grad(
    dy: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    slots: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """dbias[E, N]: the sum of an expert's rows of dy[M, N] (f32 or bf16), rows in order.

    With slots int32 [M = T * k] and weights f32 [T, k], dy has a row for each token, and a row's
    term is its token's times its slot's weight.
    """
    n_experts, n = offsets.shape[0] - 1, dy.shape[1]
    dbias = torch.empty((n_experts, n), dtype=out_dtype, device=dy.device)
    if dbias.numel() == 0:
        return dbias
    n_rows = dy.shape[0] if slots is None else slots.shape[0]
    block = moe_tuning.BIAS_GRAD_BLOCK
    grouped_bias_grad_kernel[(n_experts, triton.cdiv(n, block))](
        dbias,
        dy,
        offsets,
        offsets if slots is None else slots,
        offsets if weights is None else weights,
        dy.stride(0),
        n_rows,
        n_rows // max(1, dy.shape[0]),
        n,
        GATHERED=slots is not None,
        ROWS=moe_tuning.BIAS_GRAD_ROWS,
        BLOCK=block,
        num_warps=4,
    )
    return dbias
