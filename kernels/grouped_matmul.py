"""y[p] = weight[e] @ x[p] + bias[e] for rows p sorted by expert e, and its input gradient.

Orientation and order are those of `linear`: the weight's rows are the long side of the matrix
instruction and K is walked upwards in its own steps, so a row's bits depend neither on the other
rows nor on the tile that holds it. The weight's tiles come through Hopper's copy engine where
there is one (DESCRIPTOR), by asynchronous copies elsewhere: the same values in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import moe_tuning
from .moe_plan import Plan, plan, tile_of_plan
from .triton_compat import cast, dot
from .tuning import ProductTile


@triton.jit
def weight_tile(
    weight,
    expert,
    first_n,
    k,
    N,
    K,
    stride_we,
    stride_wn,
    stride_wk,
    EVEN_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weight[expert][first_n : + BLOCK_N, k : + BLOCK_K], 0 outside; TRANSPOSED: N contiguous."""
    if DESCRIPTOR:
        if TRANSPOSED:
            return weight.load([expert, k, first_n]).reshape(BLOCK_K, BLOCK_N).trans(1, 0)
        else:
            return weight.load([expert, first_n, k]).reshape(BLOCK_N, BLOCK_K)
    else:
        rows = first_n + tl.arange(0, BLOCK_N)
        cols = k + tl.arange(0, BLOCK_K)
        base = weight + expert.to(tl.int64) * stride_we
        tile = (
            base + rows.to(tl.int64)[:, None] * stride_wn + cols.to(tl.int64)[None, :] * stride_wk
        )
        if EVEN_K:
            return tl.load(tile, mask=(rows < N)[:, None], other=0.0)
        else:
            return tl.load(tile, mask=(rows < N)[:, None] & (cols < K)[None, :], other=0.0)


@triton.jit
def rows_tile(x_rows, live, k, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """x[rows, k : + BLOCK_K] as [BLOCK_K, rows]; x_rows [rows]: where each row begins."""
    cols = k + tl.arange(0, BLOCK_K)
    tile = x_rows[None, :] + cols[:, None]
    if EVEN_K:
        return tl.load(tile, mask=live[None, :], other=0.0)
    else:
        return tl.load(tile, mask=live[None, :] & (cols < K)[:, None], other=0.0)


@triton.jit
def grouped_matmul_kernel(
    y_ptr,
    x_ptr,
    weight,
    bias_ptr,
    tiles_ptr,
    stride_xm,
    stride_we,
    stride_wn,
    stride_wk,
    n_tiles,
    n_experts,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    expert, first, end = tile_of_plan(tiles_ptr, n_tiles, tl.program_id(0) // tiles_n)
    if expert < 0:
        return
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    rows_m = first + tl.arange(0, BLOCK_M)
    live = rows_m < end
    x_rows = x_ptr + rows_m.to(tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(0, tl.where(expert < n_experts, K, 0), BLOCK_K):  # rows of no expert give 0
        w = weight_tile(
            weight, expert, first_n, k, N, K, stride_we, stride_wn, stride_wk,
            EVEN_K, TRANSPOSED, DESCRIPTOR, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = dot(w, rows_tile(x_rows, live, k, K, EVEN_K, BLOCK_K), acc)
    rows_n = first_n + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * N + rows_n
        mask = (rows_n < N) & (expert < n_experts)
        acc += tl.load(bias, mask=mask, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(cast(acc, y_ptr.dtype.element_ty))
    out = y_ptr + rows_m.to(tl.int64)[:, None] * N + rows_n[None, :]
    tl.store(out, y, mask=live[:, None] & (rows_n < N)[None, :])


def dense_rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension, as the kernels take it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def weight_argument(
    weight: Tensor, block_n: int, block_k: int, descriptor: bool, transposed: bool
) -> Any:
    """What a kernel takes for weight [E, N, K] (or, transposed, [E, K, N]): a pointer or a map."""
    if not descriptor:
        return weight
    block = (1, block_k, block_n) if transposed else (1, block_n, block_k)
    return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), list(block))


def grouped_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    rows: Plan,
    tile: ProductTile,
    *,
    transposed: bool = False,
    descriptor: bool | None = None,
) -> Tensor:
    """y[P, N] of x[P, K] and weight[E, N, K] (transposed: [E, K, N]), rows as planned.

    Rows that no tile of the plan holds are not written.
    """
    n, k = weight.shape[1:] if not transposed else (weight.shape[2], weight.shape[1])
    y = torch.empty((x.shape[0], n), dtype=out_dtype, device=x.device)
    if y.numel() == 0 or rows.n_tiles == 0:
        return y
    if descriptor is None:
        descriptor = moe_tuning.use_descriptors(weight)
    stride_n, stride_k = weight.stride()[1:] if not transposed else weight.stride()[:0:-1]
    grouped_matmul_kernel[(rows.n_tiles * triton.cdiv(n, tile.n),)](
        y,
        x,
        weight_argument(weight, tile.n, tile.k, descriptor, transposed),
        x if bias is None else bias,
        rows.tiles,
        x.stride(0),
        weight.stride(0),
        stride_n,
        stride_k,
        rows.n_tiles,
        weight.shape[0],
        n,
        k,
        HAS_BIAS=bias is not None,
        EVEN_K=k % tile.k == 0,
        TRANSPOSED=transposed,
        DESCRIPTOR=descriptor,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    *,
    descriptor: bool | None = None,
) -> Tensor:
    """y[M, N] = weight[e] @ x[p] + bias[e] for rows p in [offsets[e], offsets[e + 1]); others 0.

    x[M, K], weight[E, N, K] (transposed: [E, K, N], the input gradient): both f32 or both bf16;
    offsets int32 [E + 1]; bias[E, N]: any float.
    """
    x, weight = dense_rows(x), dense_rows(weight)
    bias = None if bias is None else bias.contiguous()
    experts, m = weight.shape[0], x.shape[0]
    tile = moe_tuning.product_tile(moe_tuning.mean_rows(m, experts), x.dtype, x.device)
    rows = plan(offsets, None, m, tile.m, tail=True)
    return grouped_product(
        x, weight, bias, out_dtype or x.dtype, rows, tile,
        transposed=transposed, descriptor=descriptor,
    )  # fmt: skip
