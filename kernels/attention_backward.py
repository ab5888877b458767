"""Gradients of attention, by recomputation from the log-sum-exp, deterministic.

FlashAttention's backward (arXiv 2205.14135) in two passes instead of one with atomics: a program
of the first owns a tile of keys and sums dK, dV over the queries that see it, head after head of
its group; a program of the second owns a tile of queries and sums dQ over the keys it sees. That
recomputes S = Q K^T and dP = dO V^T: 7 products instead of 5, and no order left to chance. Tiles
are counted from each document's first row and chosen by shape alone, so a row's bits depend on its
own document only. A third kernel first prepares each row's lse and delta, and the sinks' gradient.

Tiles that every row sees whole skip all masks; tiles cut by a window, by causality or by a
document's end come first, in one loop. Rows and keys that are hidden from a whole program are
loaded as zeros, so their NaN stays where it is; inside a visible tile a NaN that the mask hides
from some rows alone still reaches them (0 * NaN).

Head dims that are no power of two are two blocks of columns (192 = 128 + 64), each with its own
products. Numerics: P and dS are rounded to the inputs' dtype before the products that take them,
all else is fp32. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .attention_backward_tuning import (
    AttentionBackwardTiles,
    attention_backward_tiles,
    backward_column_blocks,
    row_statistics_tile,
)
from .attention_key_gradients import key_gradients_kernel
from .attention_query_gradients import query_gradients_kernel
from .attention_tiles import load_columns
from .triton_compat import exp2

LOG2_E = tl.constexpr(1.4426950408889634)
SUM_BLOCK = 1024


@triton.jit
def row_statistics_kernel(
    lse2_ptr,
    delta_ptr,
    sink_parts_ptr,
    grad_o_ptr,
    o_ptr,
    lse_ptr,
    grad_lse_ptr,
    sinks_ptr,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_ob,
    stride_ot,
    stride_oh,
    T,
    HAS_GRAD_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """lse2 = lse * log2(e) (+inf for -inf), delta = grad_o . o - grad_lse, both [B, H, T].

    sink_parts[H, B, blocks]: this block's share of -sum exp(sink - lse) * delta.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    t = block * BLOCK_M + m
    live = t < T
    first = block.to(tl.int64) * BLOCK_M
    g_base = grad_o_ptr + batch * stride_gb + first * stride_gt + head.to(tl.int64) * stride_gh
    o_base = o_ptr + batch * stride_ob + first * stride_ot + head.to(tl.int64) * stride_oh
    g = load_columns(g_base, m, stride_gt, live, 0, BLOCK_D, D, True)
    o = load_columns(o_base, m, stride_ot, live, 0, BLOCK_D, D, True)
    row = (batch * tl.num_programs(1) + head) * T + t
    lse = tl.load(lse_ptr + row, mask=live, other=float("-inf"))
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + row, mask=live, other=0.0)
    seeing = lse != float("-inf")
    lse2 = tl.where(seeing, lse * LOG2_E, float("inf"))
    tl.store(lse2_ptr + row, lse2, mask=live)
    tl.store(delta_ptr + row, delta, mask=live)
    if HAS_SINKS:
        p = exp2(tl.load(sinks_ptr + head) * LOG2_E - lse2)
        part = (head * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(0) + block
        tl.store(sink_parts_ptr + part, -tl.sum(tl.where(seeing, p * delta, 0.0), axis=0))


@triton.jit
def sink_gradients_kernel(dsinks_ptr, parts_ptr, n_parts, BLOCK: tl.constexpr):
    """dsinks[H] = sum of parts[H, n_parts], in one order."""
    head = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, n_parts, BLOCK):
        at = begin + i
        total += tl.load(parts_ptr + head * n_parts + at, mask=at < n_parts, other=0.0)
    tl.store(dsinks_ptr + head, tl.sum(total, axis=0))


def attention_backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    *,
    tiles: AttentionBackwardTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks): contiguous, in the inputs' dtype; dsinks fp32, [0] without sinks.

    q[B, T, H, D], k[B, Tk, Hk, D], v[B, Tk, Hk, Dv], grad_o and o[B, T, H, Dv], lse and grad_lse
    fp32 [B, H, T]; or packed, without B, with int32 cu_seqlens_*[S + 1] in device memory, read
    there alone. Last dimensions contiguous, other strides free. key_mask: bool [B, Tk] or [Tk].
    D and Dv: multiples of 8, at most 256, or 512. tiles: default by shape, dtype and device.
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse2, delta, dsinks = _row_statistics(grad_o, grad_lse, o, lse, sinks)
    T, heads, dim = q.shape[-3:]
    T_k, kv_heads, value_dim = v.shape[-3:]
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks
    arch = tuning.architecture(q.device)
    tiles = tiles or attention_backward_tiles(
        q.dtype, dim, value_dim, softcap > 0, key_mask is not None, arch
    )
    varlen = cu_seqlens_q is not None
    n_docs = cu_seqlens_q.shape[0] - 1 if varlen else q.shape[0]
    grad_o, q, k, v = (_addressable(x) for x in (grad_o, q, k, v))
    # A window that reaches every key is none.
    window_left = -1 if window_left >= T_k else window_left
    window_right = -1 if window_right >= T else window_right
    (d1, d2), (dv1, dv2) = backward_column_blocks(q.dtype, dim, value_dim, arch)
    inputs = (
        grad_o,
        q,
        k,
        v,
        lse2,
        delta,
        cu_seqlens_q if varlen else lse2,
        cu_seqlens_k if varlen else lse2,
        lse2 if key_mask is None else key_mask.contiguous(),
        *_strides(grad_o),
        *_strides(q),
        *_strides(k),
        *_strides(v),
        T,
        T_k,
        n_docs,
        softmax_scale,
        softmax_scale / softcap if softcap > 0 else 0.0,
        (softcap if softcap > 0 else softmax_scale) * LOG2_E.value,
        window_left,
        window_right,
    )
    constants = {
        "HAS_LEFT": window_left >= 0,
        "HAS_RIGHT": window_right >= 0,
        "SOFTCAP": softcap > 0,
        "HAS_KEY_MASK": key_mask is not None,
        "VARLEN": varlen,
        "GROUP": heads // kv_heads,
        "D": dim,
        "D1": d1,
        "D2": d2,
        "DV": value_dim,
        "DV1": dv1,
        "DV2": dv2,
        "BLOCK_S": triton.next_power_of_2(n_docs + 1) if varlen else 1,
    }
    by_keys, by_queries = tiles.by_keys, tiles.by_queries
    key_grid = (_programs(T_k, by_keys.keys, n_docs, varlen), kv_heads)
    for with_dk, with_dv in ((True, False), (False, True)) if tiles.apart else ((True, True),):
        key_gradients_kernel[key_grid](
            dk, dv, *inputs, **constants,
            BLOCK_N=by_keys.keys, BLOCK_M=by_keys.queries, EDGE=by_keys.edge,
            STAGES=by_keys.num_stages, WITH_DK=with_dk, WITH_DV=with_dv,
            num_warps=by_keys.num_warps,
        )  # fmt: skip
    query_gradients_kernel[(_programs(T, by_queries.queries, n_docs, varlen), heads)](
        dq, *inputs, **constants,
        BLOCK_N=by_queries.keys, BLOCK_M=by_queries.queries, EDGE=by_queries.edge,
        STAGES=by_queries.num_stages, num_warps=by_queries.num_warps,
    )  # fmt: skip
    return dq, dk, dv, dsinks


def _row_statistics(
    grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2, delta, dsinks); the first two of lse's shape, fp32."""
    stats = torch.empty((2, *lse.shape), dtype=torch.float32, device=lse.device)
    T, heads, dim = o.shape[-3:]
    batch = o.shape[0] if o.ndim == 4 else 1
    dsinks = torch.zeros(0 if sinks is None else heads, dtype=torch.float32, device=o.device)
    if o.numel() == 0:
        return stats[0], stats[1], dsinks
    tile = row_statistics_tile(dim)
    blocks = triton.cdiv(T, tile.rows)
    parts = stats
    if sinks is not None:
        parts = torch.empty((heads, batch * blocks), dtype=torch.float32, device=o.device)
    grad_o, o = _addressable(grad_o), _addressable(o)
    row_statistics_kernel[(blocks, heads, batch)](
        stats[0],
        stats[1],
        parts,
        grad_o,
        o,
        lse.contiguous(),
        stats if grad_lse is None else grad_lse.contiguous(),
        stats if sinks is None else sinks,
        *_strides(grad_o),
        *_strides(o),
        T,
        HAS_GRAD_LSE=grad_lse is not None,
        HAS_SINKS=sinks is not None,
        D=dim,
        BLOCK_D=tile.columns,
        BLOCK_M=tile.rows,
        num_warps=tile.num_warps,
    )
    if sinks is not None:
        sink_gradients_kernel[(heads,)](dsinks, parts, batch * blocks, BLOCK=SUM_BLOCK, num_warps=4)
    return stats[0], stats[1], dsinks


def _programs(n_rows: int, block: int, n_docs: int, varlen: bool) -> int:
    """Tiles of all documents: exact, or as many as any division into documents could take."""
    tiles = triton.cdiv(n_rows, block)
    return tiles + n_docs if varlen else tiles * n_docs


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Elements from one batch, row and head to the next."""
    batch, row, head = x.stride()[:-1] if x.ndim == 4 else (0, *x.stride()[:-1])
    return batch, row, head


def _addressable(x: Tensor) -> Tensor:
    """x as the kernels can read it: columns side by side, a tile of 256 rows within 2^31."""
    return x if x.stride(-1) == 1 and x.stride(-3) < 2**23 else x.contiguous()
