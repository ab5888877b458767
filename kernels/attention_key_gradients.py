"""dK and dV of attention: a program owns a tile of keys and walks the queries that see it.

It sums over the heads of its group in ascending order, first all tiles that need masks, then all
others. Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    document_of_tile,
    dot_columns,
    edge_tile,
    exponent,
    in_window,
    load_columns,
    store_columns,
    tile_ranges,
)
from .triton_compat import cast, dot, exp2, recomputed


@triton.jit
def add_queries(
    dk1,
    dk2,
    dv1,
    dv2,
    k1,
    k2,
    v1,
    v2,
    n,
    m,
    tile,
    head,
    T,
    q_ptr,
    grad_o_ptr,
    lse2_ptr,
    delta_ptr,
    stride_qt: tl.constexpr,
    stride_qh,
    stride_gt: tl.constexpr,
    stride_gh,
    lo,
    hi,
    shift,
    to_tanh,
    to_exponent,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    DV1: tl.constexpr,
    DV2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dK, dV of keys n, with one tile of one head's queries added; rows in [lo, hi) count.

    dP is under way while P is computed. FMA units want their operands in registers: there only one
    product at a time has room.
    """
    ON_FMA_UNITS: tl.constexpr = k1.dtype == tl.float32
    rows = tile * BLOCK_M + m
    live = (rows >= lo) & (rows < hi)
    zero = tl.full((), 0, tl.int64)
    first, head = zero + tile * BLOCK_M, zero + head
    q_ptr += first * stride_qt + head * stride_qh
    grad_o_ptr += first * stride_gt + head * stride_gh
    lse2_ptr += head * T
    delta_ptr += head * T
    q1 = load_columns(q_ptr, m, stride_qt, live, 0, D1, D, MASKED)
    q2 = q1
    if D2 > 0:
        q2 = load_columns(q_ptr, m, stride_qt, live, D1, D2, D, MASKED)
    s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    s = dot_columns(k1, k2, q1, q2, s, D2 > 0)
    if MASKED:
        lse2 = tl.load(lse2_ptr + rows, mask=live, other=0.0)
    else:
        lse2 = tl.load(lse2_ptr + rows)
    g1 = load_columns(grad_o_ptr, m, stride_gt, live, 0, DV1, DV, MASKED)
    g2 = g1
    if DV2 > 0:
        g2 = load_columns(grad_o_ptr, m, stride_gt, live, DV1, DV2, DV, MASKED)
    if MASKED:
        delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
    else:
        delta = tl.load(delta_ptr + rows)
    dp = tl.broadcast_to(-delta[None, :], (BLOCK_N, BLOCK_M))
    if WITH_DK and not ON_FMA_UNITS:
        dp = dot_columns(v1, v2, g1, g2, dp, DV2 > 0)
    x, slope = exponent(s, lse2[None, :], to_tanh, to_exponent, SOFTCAP)
    if MASKED:
        ahead = (rows + shift)[None, :] - n[:, None]
        visible = in_window(ahead, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        x = tl.where(visible & live[None, :], x, float("-inf"))
    p = exp2(x)
    p_rounded = cast(p, k1.dtype)
    if SOFTCAP:
        p *= slope
    if WITH_DV:
        dv1 = dot(p_rounded, g1, dv1)
        if DV2 > 0:
            dv2 = dot(p_rounded, g2, dv2)
    if WITH_DK:
        if ON_FMA_UNITS:
            dp = dot_columns(v1, v2, g1, g2, dp, DV2 > 0)
        ds_rounded = cast(p * dp, k1.dtype)
        dk1 = dot(ds_rounded, q1, dk1)
        if D2 > 0:
            dk2 = dot(ds_rounded, q2, dk2)
    return dk1, dk2, dv1, dv2


@triton.jit
def key_gradients_kernel(
    dk_ptr,
    dv_ptr,
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse2_ptr,
    delta_ptr,
    cu_q_ptr,
    cu_k_ptr,
    key_mask_ptr,
    stride_gb,
    stride_gt: tl.constexpr,
    stride_gh,
    stride_qb,
    stride_qt: tl.constexpr,
    stride_qh,
    stride_kb,
    stride_kt: tl.constexpr,
    stride_kh,
    stride_vb,
    stride_vt: tl.constexpr,
    stride_vh,
    T,
    T_k,
    n_docs,
    scale,
    to_tanh,
    to_exponent,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    VARLEN: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    DV1: tl.constexpr,
    DV2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
):
    kv_head = tl.program_id(1)
    doc, tile, first_q, len_q, first_k, len_k = document_of_tile(
        tl.program_id(0), cu_k_ptr, T_k, cu_q_ptr, cu_k_ptr, T, T_k, n_docs,
        VARLEN, BLOCK_N, BLOCK_S,
    )  # fmt: skip
    if doc > n_docs:
        return
    batch = doc.to(tl.int64)
    if VARLEN:
        batch = batch * 0
        len_q = tl.where(doc < n_docs, len_q, 0)
    shift = len_k - len_q
    j = tl.arange(0, BLOCK_N)
    n = tile * BLOCK_N + j
    n_first = tile * BLOCK_N
    n_last = tl.minimum(n_first + BLOCK_N, len_k) - 1
    stored = n < len_k

    # Query rows that see one of the keys [lo, hi), and those that see all of them.
    lo, full_lo, hi, full_hi = 0, 0, len_q, len_q
    if HAS_RIGHT:
        lo = tl.maximum(0, n_first - window_right - shift)
        full_lo = tl.maximum(0, n_last - window_right - shift)
    if HAS_LEFT:
        hi = tl.minimum(len_q, n_last + window_left - shift + 1)
        full_hi = tl.minimum(len_q, n_first + window_left - shift + 1)
    begin, n_edge, full_begin, n_full = tile_ranges(lo, hi, full_lo, full_hi, BLOCK_M, EDGE)

    first_key = (first_k + n_first).to(tl.int64)
    k_ptr += batch * stride_kb + first_key * stride_kt + kv_head.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + first_key * stride_vt + kv_head.to(tl.int64) * stride_vh
    k1 = load_columns(k_ptr, j, stride_kt, stored, 0, D1, D, True)
    k2, v1, v2 = k1, k1, k1
    dk1, dk2 = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    dv1, dv2 = dk1, dk2
    if D2 > 0:
        k2 = load_columns(k_ptr, j, stride_kt, stored, D1, D2, D, True)
    if WITH_DK:
        dk1 = tl.zeros((BLOCK_N, D1), tl.float32)
        if D2 > 0:
            dk2 = tl.zeros((BLOCK_N, D2), tl.float32)
        v1 = load_columns(v_ptr, j, stride_vt, stored, 0, DV1, DV, True)
        if DV2 > 0:
            v2 = load_columns(v_ptr, j, stride_vt, stored, DV1, DV2, DV, True)
    if WITH_DV:
        dv1 = tl.zeros((BLOCK_N, DV1), tl.float32)
        if DV2 > 0:
            dv2 = tl.zeros((BLOCK_N, DV2), tl.float32)

    # One loop over all heads, so that its pipeline fills once: step = head * tiles + tile.
    first_head = kv_head * GROUP
    q_ptr += batch * stride_qb + first_q.to(tl.int64) * stride_qt
    grad_o_ptr += batch * stride_gb + first_q.to(tl.int64) * stride_gt
    first_row = batch * tl.num_programs(1) * GROUP * T + first_q
    m = tl.arange(0, EDGE)
    for step in tl.range(0, n_edge * GROUP, num_stages=STAGES):
        q_tile = edge_tile(step % n_edge, begin, full_begin, n_full, BLOCK_M // EDGE)
        dk1, dk2, dv1, dv2 = add_queries(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, n, m, q_tile, first_head + step // n_edge, T,
            q_ptr, grad_o_ptr, lse2_ptr + first_row, delta_ptr + first_row,
            stride_qt, stride_qh, stride_gt, stride_gh, lo, hi, shift,
            to_tanh, to_exponent, window_left, window_right, HAS_LEFT, HAS_RIGHT, SOFTCAP,
            D, D1, D2, DV, DV1, DV2, BLOCK_N, EDGE,
            WITH_DK, WITH_DV, True,
        )  # fmt: skip
    m = recomputed(tl.arange(0, BLOCK_M))
    for step in tl.range(0, n_full * GROUP, num_stages=STAGES):
        q_tile = full_begin + step % n_full
        dk1, dk2, dv1, dv2 = add_queries(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, n, m, q_tile, first_head + step // n_full, T,
            q_ptr, grad_o_ptr, lse2_ptr + first_row, delta_ptr + first_row,
            stride_qt, stride_qh, stride_gt, stride_gh, lo, hi, shift,
            to_tanh, to_exponent, window_left, window_right, HAS_LEFT, HAS_RIGHT, SOFTCAP,
            D, D1, D2, DV, DV1, DV2, BLOCK_N, BLOCK_M,
            WITH_DK, WITH_DV, False,
        )  # fmt: skip

    j, tile, first_k = recomputed(j), recomputed(tile), recomputed(first_k)
    first_key = (first_k + tile * BLOCK_N).to(tl.int64)
    stored = tile * BLOCK_N + j < len_k
    kept = stored
    if HAS_KEY_MASK:
        keys = key_mask_ptr + batch * T_k + first_key
        kept = tl.load(keys + j, mask=stored, other=0) != 0
    kv_heads = tl.num_programs(1)
    out_row = (batch * T_k + first_key) * kv_heads + kv_head
    dk_ptr += out_row * D
    dv_ptr += out_row * DV
    keep = kept[:, None]
    to = kv_heads * D
    if WITH_DK:
        store_columns(dk_ptr, tl.where(keep, dk1 * scale, 0.0), j, to, stored, 0, D1, D)
        if D2 > 0:
            store_columns(dk_ptr, tl.where(keep, dk2 * scale, 0.0), j, to, stored, D1, D2, D)
    to = kv_heads * DV
    if WITH_DV:
        store_columns(dv_ptr, tl.where(keep, dv1, 0.0), j, to, stored, 0, DV1, DV)
        if DV2 > 0:
            store_columns(dv_ptr, tl.where(keep, dv2, 0.0), j, to, stored, DV1, DV2, DV)
