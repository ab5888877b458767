"""Attention of dense batches, packed documents and paged caches: one kernel.

A program takes BLOCK_M query rows of one KV head; the heads of a GQA group are packed as rows
(row = token * group + head), so that keys are read once for the group and a diagonal tile hides
less. Keys are walked in tiles from the document's position 0 with the online softmax. Tiles that
no row sees are skipped; only tiles on an edge of what is visible (window, diagonal, end) compare
positions, behind a branch that all threads take alike. (Loops of their own for edges and for whole
tiles, as kernels often have them, drain the pipeline between them, take 10 to 90 registers more
and make ptxas serialize wgmma when there are three.)

`batch_invariant` fixes the tile: 64 positions, and every 512 the running (max, sum, output) starts
afresh and the finished split is merged, in ascending order, by one function. Many query rows run
all splits in one program, few run them in parallel programs and a second kernel merges them. Dense,
packed and paged keys, long and short calls are one compiled source with one tile, one order of
keys, explicit fused multiply-adds and one merge; tiles that a row does not see change nothing,
exactly. Hence a row's bits depend on its own keys only. That the specializations of the source keep
the same instruction order inside a tile is a property of the compiler, to be held by a test on each
GPU. Without it the tile fits the GPU, dtype and head dims, and only few rows split.

Numerics: q.k, sums and statistics in fp32; P = 2^(s - m) is rounded to q's dtype for P V. int8 keys
and values enter the products as their codes, which fp16 and bf16 hold exactly (an fp32 factor is
then three of bf16); a key's scale multiplies its score, a value's its P before that rounding. A
key that no row of a program sees, whatever it holds, changes nothing; within a tile, NaN in a value
reaches the rows before its position too. Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_keys import hide, key_rows, load_columns, locate, product, visible_range
from .online_softmax import finish, merge_splits, update
from .triton_compat import cast, recomputed, tanh
from .varlen import page_known


@triton.jit
def attention_kernel(
    o_ptr,
    lse_ptr,
    partial_ptr,
    m_ptr,
    total_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    pages_ptr,
    cu_seqlens_q_ptr,
    lengths_k_ptr,
    key_mask_ptr,
    sinks_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    T,
    Tk,
    n_rows,
    n_seqs,
    max_pages,
    n_pages,
    factor,
    softcap_scale,
    left,
    right,
    STRIDE_KT: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    LAYOUT: tl.constexpr,
    WORD: tl.constexpr,
    SIGN: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HALF_CODES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    seq, tile, entry, first_token, n_tokens, first_key, len_k = locate(
        tl.program_id(0), cu_seqlens_q_ptr, lengths_k_ptr, T, Tk, n_seqs,
        GROUP, LAYOUT, BLOCK_M, BLOCK_S,
    )  # fmt: skip
    if seq > n_seqs:
        return
    tile = tl.cdiv(n_tokens * GROUP, BLOCK_M) - 1 - tile  # the longest rows start first

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < n_tokens * GROUP
    token = tl.minimum(rows // GROUP, n_tokens - 1)
    head = kv_head * GROUP + rows % GROUP
    q_position = len_k - n_tokens + token
    first_position = len_k - n_tokens + tile * BLOCK_M // GROUP
    last_position = (
        len_k - n_tokens + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, n_tokens - 1)
    )
    k_begin, k_end = visible_range(
        first_position, last_position, tl.minimum(len_k, Tk), left, right, LEFT, RIGHT
    )
    if MERGE == "kernel":
        k_begin = tl.maximum(k_begin, split * SPLIT)
        k_end = tl.minimum(k_end, (split + 1) * SPLIT)
        if k_begin >= k_end:
            return

    # Strides come in units of WORD elements, which tells the compiler their alignment.
    t = (first_token + token).to(tl.int64)
    q_rows = q_ptr + (entry * (stride_qb * WORD) + t * (stride_qt * WORD))[:, None]
    q_rows += (head * (stride_qh * WORD))[:, None]
    d = tl.arange(0, BLOCK_D)
    q = load_columns(q_rows, d, live, BLOCK_D <= D, D)
    q_rest, d_rest = q, d
    if BLOCK_REST > 0:
        d_rest = BLOCK_D + tl.arange(0, BLOCK_REST)
        q_rest = load_columns(q_rows, d_rest, live, BLOCK_D + BLOCK_REST <= D, D)
    if SIGN != 1:
        q = cast(q.to(tl.float32) * SIGN, q.dtype)
        q_rest = cast(q_rest.to(tl.float32) * SIGN, q.dtype)
    keys, mask_keys = first_key.to(tl.int64), first_key.to(tl.int64)
    if LAYOUT == "batch":
        mask_keys = entry * Tk
    if LAYOUT != "paged":
        k_ptr += entry * (stride_kb * WORD) + keys * STRIDE_KT
        k_ptr += kv_head.to(tl.int64) * (stride_kh * WORD)
        v_ptr += entry * (stride_vb * WORD) + keys * STRIDE_VT
        v_ptr += kv_head.to(tl.int64) * (stride_vh * WORD)
    if key_mask_ptr is not None:
        key_mask_ptr += mask_keys
    if LAYOUT == "paged":
        pages_ptr += tl.minimum(seq, n_seqs - 1).to(tl.int64) * max_pages

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    acc_done, m_done, total_done = acc, m, total

    # Tiles in [inner, outer) are whole and seen by every row; the others are edges.
    begin = k_begin // BLOCK_N * BLOCK_N
    inner, outer = begin, k_end // BLOCK_N * BLOCK_N
    if RIGHT:
        outer = tl.minimum(outer, tl.maximum(first_position + right + 1, 0) // BLOCK_N * BLOCK_N)
    if LEFT:
        inner = last_position - left
    n = tl.arange(0, BLOCK_N)
    dv = tl.arange(0, BLOCK_DV)
    FACTOR: tl.constexpr = tl.bfloat16 if HALF_CODES else q.dtype
    for start in range(begin, k_end, BLOCK_N):
        if MERGE == "registers":
            if start % SPLIT == 0:
                m_done, total_done, acc_done = merge_splits(
                    m_done, total_done, acc_done, m, total, acc
                )
                m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_M,), tl.float32)
                acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)

        position = start + n
        stored = (position >= k_begin) & (position < k_end)
        if key_mask_ptr is not None:
            stored &= tl.load(key_mask_ptr + position, mask=stored, other=0) != 0
        first, row, there = key_rows(
            start, position, stored, pages_ptr, n_pages, kv_head, KV_HEADS, PAGE, BLOCK_N
        )
        k_rows = k_ptr + first * STRIDE_KT + (row * STRIDE_KT)[:, None]
        k = load_columns(k_rows, d, there, BLOCK_D <= D, D)
        s = product(q, tl.trans(cast(k, FACTOR)), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if BLOCK_REST > 0:
            k = load_columns(k_rows, d_rest, there, BLOCK_D + BLOCK_REST <= D, D)
            s = product(q_rest, tl.trans(cast(k, FACTOR)), s)
        if k_scales_ptr is not None:
            s *= tl.load(k_scales_ptr + first + row, mask=there, other=0.0)[None, :]
        if SOFTCAP:
            s = tanh(s * softcap_scale)
        if key_mask_ptr is not None:
            s = hide(s, position, stored, q_position, left, right, LEFT, RIGHT)
        else:
            # Selected outside the branch too: else the compiler does not see that both products
            # work on the same rows, and on sm_80 lays them out so that P crosses shared memory.
            edge = (start < inner) | (start >= outer)
            if LAYOUT == "paged":
                if PAGE % BLOCK_N == 0:
                    known = page_known(pages_ptr, start // PAGE, True, n_pages)
                    edge |= not known
                else:  # several pages: that all are known would be a reduction
                    known = page_known(pages_ptr, position // PAGE, stored, n_pages)
                    edge = True
                stored &= known
            s_seen = s
            if edge:
                s_seen = hide(s, position, stored, q_position, left, right, LEFT, RIGHT)
            s = tl.where(edge, s_seen, s)
        p, alpha, m, total = update(s, m, total, factor)
        if v_scales_ptr is not None:
            p *= tl.load(v_scales_ptr + first + row, mask=there, other=0.0)[None, :]
        # A value that no row sees is read as 0: 0 * NaN would reach the output.
        v_rows = v_ptr + first * STRIDE_VT + (row * STRIDE_VT)[:, None]
        v = load_columns(v_rows, dv, there, BLOCK_DV <= DV, DV)
        acc = product(cast(p, q.dtype), cast(v, FACTOR), acc * alpha[:, None])

    rows = recomputed(tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < n_tokens * GROUP
    head = kv_head * GROUP + rows % GROUP
    t = (first_token + rows // GROUP).to(tl.int64)
    out_row = (entry * T + t) * (KV_HEADS * GROUP) + head
    mask_o = live[:, None] & (dv < DV)[None, :]
    if MERGE == "kernel":
        out_row += split.to(tl.int64) * n_rows
        tl.store(m_ptr + out_row, m, mask=live)
        tl.store(total_ptr + out_row, total, mask=live)
        tl.store(partial_ptr + out_row[:, None] * DV + dv[None, :], acc, mask=mask_o)
    else:
        if MERGE == "registers":
            m, total, acc = merge_splits(m_done, total_done, acc_done, m, total, acc)
        sink = None
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=live & (seq < n_seqs), other=float("-inf"))
        share, lse = finish(m, total, sink)
        if lse_ptr is not None:
            lse_row = (entry * (KV_HEADS * GROUP) + head) * T + t
            tl.store(lse_ptr + lse_row, lse, mask=live)
        o = cast(acc * share[:, None], o_ptr.dtype.element_ty)
        tl.store(o_ptr + out_row[:, None] * DV + dv[None, :], o, mask=mask_o)


@triton.jit
def combine_splits_kernel(
    o_ptr,
    lse_ptr,
    partial_ptr,
    m_ptr,
    total_ptr,
    cu_seqlens_q_ptr,
    lengths_k_ptr,
    sinks_ptr,
    T,
    Tk,
    n_rows,
    n_seqs,
    left,
    right,
    LAYOUT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    H: tl.constexpr,
    DV: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row of the output from its parallel splits, in ascending order."""
    head = tl.program_id(1)
    seq, token, entry, first_token, n_tokens, _, len_k = locate(
        tl.program_id(0), cu_seqlens_q_ptr, lengths_k_ptr, T, Tk, n_seqs, 1, LAYOUT, 1, BLOCK_S
    )
    if seq > n_seqs:
        return
    position = len_k - n_tokens + token
    k_begin, k_end = visible_range(
        position, position, tl.minimum(len_k, Tk), left, right, LEFT, RIGHT
    )
    t = (first_token + token).to(tl.int64)
    row = (entry * T + t) * H + head
    dv = tl.arange(0, BLOCK_DV)[None, :]

    m = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_DV), tl.float32)
    last = tl.where(k_end > k_begin, tl.cdiv(k_end, SPLIT), 0)
    for split in range(k_begin // SPLIT, last):
        at = (tl.full((1,), 0, tl.int64) + split) * n_rows + row
        m2, total2 = tl.load(m_ptr + at), tl.load(total_ptr + at)
        acc2 = tl.load(partial_ptr + at[:, None] * DV + dv, mask=dv < DV, other=0.0)
        m, total, acc = merge_splits(m, total, acc, m2, total2, acc2)
    sink = None
    if sinks_ptr is not None:
        at = tl.full((1,), 0, tl.int32) + head
        sink = tl.load(sinks_ptr + at, mask=(at >= 0) & (seq < n_seqs), other=float("-inf"))
    share, lse = finish(m, total, sink)
    if lse_ptr is not None:
        tl.store(lse_ptr + (entry * H + head) * T + t + tl.arange(0, 1), lse)
    o = cast(acc * share[:, None], o_ptr.dtype.element_ty)
    tl.store(o_ptr + row * DV + dv, o, mask=dv < DV)
