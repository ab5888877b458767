"""y[t, h] = weight[h] @ x[t, h], then tail[t, h]: one product a head, as `linear` does it.

The weight's rows are the long side of the matrix instruction and K is walked upwards in the
instruction's own steps, with one fp32 accumulator an output: a row's bits depend neither on how
many rows there are nor on which tile holds it (see `linear`). A head's weight may lie by rows or by
columns; the tile is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_compat import cast, dot


@triton.jit
def head_linear_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    stride_yt,
    stride_yh,
    stride_xt,
    stride_xh,
    stride_wh,
    stride_wn,
    stride_wk,
    M,
    N,
    K,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n, tile_m = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m
    head = tl.program_id(1).to(tl.int64)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    weight_tile = weight_ptr + head * stride_wh + rows_n.to(tl.int64)[:, None] * stride_wn
    x_tile = x_ptr + head * stride_xh + rows_m.to(tl.int64)[None, :] * stride_xt + cols[:, None]
    mask_n, mask_m = (rows_n < N)[:, None], (rows_m < M)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        w_ptrs = weight_tile + (k + cols)[None, :] * stride_wk
        if EVEN_K:
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
            x = tl.load(x_tile + k, mask=mask_m, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=mask_n & (cols < K - k)[None, :], other=0.0)
            x = tl.load(x_tile + k, mask=mask_m & (cols < K - k)[:, None], other=0.0)
        acc = dot(w, x, acc)
    y = cast(tl.trans(acc), y_ptr.dtype.element_ty)
    y_rows = y_ptr + head * stride_yh + rows_m.to(tl.int64)[:, None] * stride_yt
    tl.store(y_rows + rows_n[None, :], y, mask=(rows_m < M)[:, None] & (rows_n < N)[None, :])


def head_linear(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    """y[T, H, N + P] of x[T, H, K], weight[H, N, K], tail[T, H, P]: all f32 or all bf16.

    Last dimensions of x and tail contiguous; rows or columns of a head's weight contiguous.
    """
    n_tokens, n_heads, k = x.shape
    n = weight.shape[1]
    width = n + (0 if tail is None else tail.shape[2])
    y = torch.empty((n_tokens, n_heads, width), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if tail is not None:
        y[..., n:] = tail
    tile = tuning.linear_tile(n_tokens, x.dtype)
    head_linear_kernel[(triton.cdiv(n, tile.n) * triton.cdiv(n_tokens, tile.m), n_heads)](
        y, x, weight,
        y.stride(0), y.stride(1), x.stride(0), x.stride(1), *weight.stride(),
        n_tokens, n, k,
        EVEN_K=k % tile.k == 0,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return y
