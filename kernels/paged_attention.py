"""Causal attention over the paged KV cache, for prompts and single tokens alike.

A program takes BLOCK_M query rows of one KV head; the heads of a GQA group are packed as rows
(row = token * group + head), so that a decoded token reads each page once. Keys are walked in
tiles of one page from the document's position 0, with the online softmax of FlashAttention
(arXiv 2205.14135), and every 512 positions the running (max, sum, output) starts afresh and the
finished split is merged, in ascending order, by one function.

What is guaranteed. Prompts run all splits in one program, few query rows run them in parallel
programs and a second kernel merges them. Both are one compiled source with one tile shape, one
order of keys, explicit fused multiply-adds and one merge; tiles that a row does not see change
nothing, exactly. Hence a row's bits depend on its own keys only, not on paging, chunking, batch,
or which path ran it. That the two specializations of the source keep the same instruction order
inside a tile is a property of the compiler, to be held by a test on each GPU.
`batch_invariant=False` takes a tile that fits the rows, and so drops the last sentence.

Numerics: q, k, v and P = exp(s - m) in the cache dtype, sums and m in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_compat import cast, dot, exp2, fma
from .varlen import sequence_of_tile

SPLIT_POSITIONS = 512
LOG2_E = 1.4426950408889634


@triton.jit
def merge_splits(m1, l1, o1, m2, l2, o2):
    """Adds a later split (m2, l2, o2) to the merged earlier ones (m1, l1, o1), row by row.

    m[R]: maximum of the base-2 logits; l[R], o[R, D]: sum and output at that maximum. A split
    without keys (m2 = -inf) changes nothing; the first split with keys is taken as it is.
    """
    m = tl.maximum(m1, m2)
    shift = tl.where(m == float("-inf"), 0.0, m)
    keep, add = exp2(m1 - shift), exp2(m2 - shift)
    l_sum = fma(l2, add, l1 * keep)
    return m, l_sum, fma(o2, tl.broadcast_to(add[:, None], o2.shape), o1 * keep[:, None])


@triton.jit
def paged_attention_kernel(
    o_ptr,
    partial_ptr,
    m_ptr,
    l_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,
    cu_seqlens_ptr,
    cache_seqlens_ptr,
    stride_qt,
    stride_qh,
    T,
    n_seqs,
    max_pages,
    scale_log2,
    window_left,
    HAS_WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    kv_head = tl.program_id(1)
    seq, tile = sequence_of_tile(cu_seqlens_ptr, tl.program_id(0), n_seqs, GROUP, BLOCK_M, BLOCK_S)
    if seq >= n_seqs:
        return
    first_token = tl.load(cu_seqlens_ptr + seq)
    n_tokens = tl.load(cu_seqlens_ptr + seq + 1) - first_token
    cache_len = tl.load(cache_seqlens_ptr + seq)
    tile = tl.cdiv(n_tokens * GROUP, BLOCK_M) - 1 - tile  # the longest rows start first

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < n_tokens * GROUP
    token = tl.minimum(rows // GROUP, n_tokens - 1)
    head = kv_head * GROUP + rows % GROUP
    q_position = cache_len - n_tokens + token
    d = tl.arange(0, BLOCK_D)
    t = (first_token + token).to(tl.int64)
    mask_o = live[:, None] & (d < D)[None, :]

    # Positions that some row of the tile can see: [k_begin, k_end).
    k_end = tl.minimum(
        cache_len, cache_len - n_tokens + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1
    )
    k_begin = 0
    if HAS_WINDOW:
        k_begin = tl.maximum(0, cache_len - n_tokens + (tile * BLOCK_M) // GROUP - window_left)
    split = tl.program_id(2)
    if MERGE == "kernel":
        k_begin = tl.maximum(k_begin, split * SPLIT)
        k_end = tl.minimum(k_end, (split + 1) * SPLIT)
        if k_begin >= k_end:
            return

    q_offsets = t[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask_o, other=0.0)
    kv = tl.arange(0, PAGE)
    kv_offsets = kv[:, None] * D + d[None, :]
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m_done, l_done, acc_done = m, total, acc

    for page_index in range(k_begin // PAGE, tl.cdiv(k_end, PAGE)):
        if MERGE == "registers":
            if page_index % (SPLIT // PAGE) == 0:
                m_done, l_done, acc_done = merge_splits(m_done, l_done, acc_done, m, total, acc)
                m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_M,), tl.float32)
                acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        page = tl.load(block_table_ptr + seq.to(tl.int64) * max_pages + page_index)
        base = (page.to(tl.int64) * KV_HEADS + kv_head) * PAGE * D
        position = page_index * PAGE + kv
        if BLOCK_D == D:
            k = tl.load(k_cache_ptr + base + kv_offsets)
        else:
            k = tl.load(k_cache_ptr + base + kv_offsets, mask=(d < D)[None, :], other=0.0)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, PAGE), tl.float32))
        visible = position[None, :] <= q_position[:, None]
        if HAS_WINDOW:
            visible &= position[None, :] >= q_position[:, None] - window_left
        s = tl.where(visible, s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = exp2(s - shift[:, None])
        alpha = exp2(m - shift)
        total = fma(total, alpha, tl.sum(p, axis=1))
        m = m_new
        # Rows past the sequence's end hold whatever was there: 0 * NaN would reach the output.
        stored = (position < cache_len)[:, None]
        if BLOCK_D != D:
            stored &= (d < D)[None, :]
        v = tl.load(v_cache_ptr + base + kv_offsets, mask=stored, other=0.0)
        acc = dot(cast(p, v.dtype), v, acc * alpha[:, None])

    out_row = (split.to(tl.int64) * T + t) * (KV_HEADS * GROUP) + head
    out_offsets = out_row[:, None] * D + d[None, :]
    if MERGE == "kernel":
        tl.store(m_ptr + out_row, m, mask=live)
        tl.store(l_ptr + out_row, total, mask=live)
        tl.store(partial_ptr + out_offsets, acc, mask=mask_o)
    else:
        if MERGE == "registers":
            m, total, acc = merge_splits(m_done, l_done, acc_done, m, total, acc)
        o = acc / tl.where(total > 0, total, 1.0)[:, None]  # total is 0 for a dead slot alone
        tl.store(o_ptr + out_offsets, cast(o, o_ptr.dtype.element_ty), mask=mask_o)


@triton.jit
def combine_splits_kernel(
    o_ptr,
    m_ptr,
    l_ptr,
    partial_ptr,
    cu_seqlens_ptr,
    cache_seqlens_ptr,
    T,
    n_seqs,
    window_left,
    HAS_WINDOW: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    t = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)[None, :]
    seq, token = sequence_of_tile(cu_seqlens_ptr, t, n_seqs, 1, 1, BLOCK_S)
    if seq >= n_seqs:
        return
    cache_len = tl.load(cache_seqlens_ptr + seq)
    first_token = tl.load(cu_seqlens_ptr + seq)
    position = cache_len - (tl.load(cu_seqlens_ptr + seq + 1) - first_token) + token
    k_begin = 0
    if HAS_WINDOW:
        k_begin = tl.maximum(0, position - window_left)
    k_end = tl.where(cache_len > 0, position + 1, 0)

    m = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    for split in range(k_begin // SPLIT, tl.cdiv(k_end, SPLIT)):
        row = (tl.full((1,), 0, tl.int64) + split) * T * H + t * H + head
        m2, l2 = tl.load(m_ptr + row), tl.load(l_ptr + row)
        o2 = tl.load(partial_ptr + row[:, None] * D + d, mask=d < D, other=0.0)
        m, total, acc = merge_splits(m, total, acc, m2, l2, o2)
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    o_row = (t.to(tl.int64) * H + head) * D
    tl.store(o_ptr + o_row + d, cast(o, o_ptr.dtype.element_ty), mask=d < D)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    window_left: int = -1,
    *,
    batch_invariant: bool = True,
) -> Tensor:
    """o[T, H, D]: causal attention of each sequence's last tokens over its cache.

    q[T, H, D]: any strides of T and H; k_cache, v_cache [pages, Hk, page_size, D]: q's dtype,
    contiguous, page_size a power of two that divides 512; block_table[S, P], cu_seqlens_q[S + 1],
    cache_seqlens[S]: int32 in device memory, read there alone. cache_seqlens includes this step's
    tokens; 0 marks a dead slot, whose rows are 0. T must be cu_seqlens_q[S]. window_left: keys
    further back than this are not seen; -1 is no window. Parallel splits are launched for
    P * page_size positions: a captured graph should carry a block table of its bucket's width.
    """
    n_tokens, n_heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    n_seqs, max_pages = block_table.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    group = n_heads // kv_heads
    n_splits = triton.cdiv(max_pages * page, SPLIT_POSITIONS)
    tile = tuning.attention_tile(n_tokens, n_seqs, n_splits, q.dtype, dim, batch_invariant)
    m, total, partial = o, o, o
    if tile.merge == "kernel":
        stats = torch.empty((2, n_splits, n_tokens, n_heads), dtype=torch.float32, device=q.device)
        m, total = stats[0], stats[1]
        partial = torch.empty((n_splits, *q.shape), dtype=torch.float32, device=q.device)
    block_s = triton.next_power_of_2(n_seqs)
    block_d = max(16, triton.next_power_of_2(dim))
    n_tiles = n_tokens * group // tile.m + n_seqs  # at least the sum of every sequence's tiles
    paged_attention_kernel[(n_tiles, kv_heads, n_splits if tile.merge == "kernel" else 1)](
        o,
        partial,
        m,
        total,
        q,
        k_cache,
        v_cache,
        block_table,
        cu_seqlens_q,
        cache_seqlens,
        q.stride(0),
        q.stride(1),
        n_tokens,
        n_seqs,
        max_pages,
        softmax_scale * LOG2_E,
        window_left,
        HAS_WINDOW=window_left >= 0,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=dim,
        PAGE=page,
        SPLIT=SPLIT_POSITIONS,
        MERGE=tile.merge,
        BLOCK_M=tile.m,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if tile.merge == "kernel":
        combine_splits_kernel[(n_tokens, n_heads)](
            o,
            m,
            total,
            partial,
            cu_seqlens_q,
            cache_seqlens,
            n_tokens,
            n_seqs,
            window_left,
            HAS_WINDOW=window_left >= 0,
            H=n_heads,
            D=dim,
            SPLIT=SPLIT_POSITIONS,
            BLOCK_D=block_d,
            BLOCK_S=block_s,
            num_warps=1,
        )
    return o
