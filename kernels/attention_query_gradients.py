"""dQ of attention: a program owns a tile of one head's queries and walks the keys they see.

Not yet run on a GPU.
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
def add_keys(
    dq1,
    dq2,
    q1,
    q2,
    g1,
    g2,
    lse2,
    delta,
    position,
    j,
    tile,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    stride_kt: tl.constexpr,
    stride_vt: tl.constexpr,
    lo,
    hi,
    to_tanh,
    to_exponent,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    DV1: tl.constexpr,
    DV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dQ of the rows at `position`, with one tile of keys added; keys in [lo, hi) count."""
    n = tile * BLOCK_N + j
    live = (n >= lo) & (n < hi)
    if HAS_KEY_MASK:
        live &= tl.load(key_mask_ptr + n, mask=live, other=0) != 0
    first = tl.full((), 0, tl.int64) + tile * BLOCK_N
    k_ptr += first * stride_kt
    v_ptr += first * stride_vt
    k1 = load_columns(k_ptr, j, stride_kt, live, 0, D1, D, MASKED)
    v1 = load_columns(v_ptr, j, stride_vt, live, 0, DV1, DV, MASKED)
    k2, v2 = k1, v1
    if D2 > 0:
        k2 = load_columns(k_ptr, j, stride_kt, live, D1, D2, D, MASKED)
    if DV2 > 0:
        v2 = load_columns(v_ptr, j, stride_vt, live, DV1, DV2, DV, MASKED)
    ON_FMA_UNITS: tl.constexpr = k1.dtype == tl.float32
    dp = tl.broadcast_to(-delta[:, None], (BLOCK_M, BLOCK_N))

    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s = dot_columns(q1, q2, k1, k2, s, D2 > 0)
    if not ON_FMA_UNITS:
        dp = dot_columns(g1, g2, v1, v2, dp, DV2 > 0)
    x, slope = exponent(s, lse2[:, None], to_tanh, to_exponent, SOFTCAP)
    p = exp2(x) * slope
    if ON_FMA_UNITS:
        dp = dot_columns(g1, g2, v1, v2, dp, DV2 > 0)
    ds = p * dp
    if MASKED:
        ahead = position[:, None] - n[None, :]
        visible = in_window(ahead, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        ds = tl.where(visible & live[None, :], ds, 0.0)
    ds_rounded = cast(ds, k1.dtype)
    dq1 = dot(ds_rounded, k1, dq1)
    if D2 > 0:
        dq2 = dot(ds_rounded, k2, dq2)
    return dq1, dq2


@triton.jit
def query_gradients_kernel(
    dq_ptr,
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
):
    head, heads = tl.program_id(1), tl.num_programs(1)
    doc, tile, first_q, len_q, first_k, len_k = document_of_tile(
        tl.program_id(0), cu_q_ptr, T, cu_q_ptr, cu_k_ptr, T, T_k, n_docs,
        VARLEN, BLOCK_M, BLOCK_S,
    )  # fmt: skip
    if doc > n_docs:
        return
    batch = doc.to(tl.int64)
    if VARLEN:
        batch = batch * 0
        len_k = tl.where(doc < n_docs, len_k, 0)
    if HAS_RIGHT:  # the rows that see most start first
        tile = tl.where(doc < n_docs, tl.cdiv(len_q, BLOCK_M) - 1 - tile, tile)
    i = tl.arange(0, BLOCK_M)
    m_first = tile * BLOCK_M
    rows = m_first + i
    stored = rows < len_q
    position = rows + len_k - len_q
    p_first = m_first + len_k - len_q
    p_last = tl.minimum(m_first + BLOCK_M, len_q) - 1 + len_k - len_q

    # Keys that one of the rows sees [lo, hi), and those that all of them see.
    lo, full_lo, hi, full_hi = 0, 0, len_k, len_k
    if HAS_LEFT:
        lo = tl.maximum(0, p_first - window_left)
        full_lo = tl.maximum(0, p_last - window_left)
    if HAS_RIGHT:
        hi = tl.minimum(len_k, p_last + window_right + 1)
        full_hi = tl.minimum(len_k, p_first + window_right + 1)
    if HAS_KEY_MASK:
        full_hi = full_hi * 0
    begin, n_edge, full_begin, n_full = tile_ranges(lo, hi, full_lo, full_hi, BLOCK_N, EDGE)

    first_row = (first_q + m_first).to(tl.int64)
    q_ptr += batch * stride_qb + first_row * stride_qt + head.to(tl.int64) * stride_qh
    grad_o_ptr += batch * stride_gb + first_row * stride_gt + head.to(tl.int64) * stride_gh
    q1 = load_columns(q_ptr, i, stride_qt, stored, 0, D1, D, True)
    g1 = load_columns(grad_o_ptr, i, stride_gt, stored, 0, DV1, DV, True)
    q2, g2 = q1, g1
    dq1, dq2 = tl.zeros((BLOCK_M, D1), tl.float32), tl.zeros((1,), tl.float32)
    if D2 > 0:
        q2 = load_columns(q_ptr, i, stride_qt, stored, D1, D2, D, True)
        dq2 = tl.zeros((BLOCK_M, D2), tl.float32)
    if DV2 > 0:
        g2 = load_columns(grad_o_ptr, i, stride_gt, stored, DV1, DV2, DV, True)
    row = (batch * heads + head) * T + first_row + i
    lse2 = tl.load(lse2_ptr + row, mask=stored, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=stored, other=0.0)

    kv_head = (head // GROUP).to(tl.int64)
    k_ptr += batch * stride_kb + first_k.to(tl.int64) * stride_kt + kv_head * stride_kh
    v_ptr += batch * stride_vb + first_k.to(tl.int64) * stride_vt + kv_head * stride_vh
    key_mask_ptr += batch * T_k + first_k
    j = tl.arange(0, EDGE)
    for at in tl.range(0, n_edge, num_stages=STAGES):
        k_tile = edge_tile(at, begin, full_begin, n_full, BLOCK_N // EDGE)
        dq1, dq2 = add_keys(
            dq1, dq2, q1, q2, g1, g2, lse2, delta, position, j, k_tile,
            k_ptr, v_ptr, key_mask_ptr, stride_kt, stride_vt, lo, hi, to_tanh, to_exponent,
            window_left, window_right, HAS_LEFT, HAS_RIGHT, SOFTCAP, HAS_KEY_MASK,
            D, D1, D2, DV, DV1, DV2, BLOCK_M, EDGE, True,
        )  # fmt: skip
    if not HAS_KEY_MASK:
        j = recomputed(tl.arange(0, BLOCK_N))
        for k_tile in tl.range(full_begin, full_begin + n_full, num_stages=STAGES):
            dq1, dq2 = add_keys(
                dq1, dq2, q1, q2, g1, g2, lse2, delta, position, j, k_tile,
                k_ptr, v_ptr, key_mask_ptr, stride_kt, stride_vt, lo, hi, to_tanh, to_exponent,
                window_left, window_right, HAS_LEFT, HAS_RIGHT, SOFTCAP, False,
                D, D1, D2, DV, DV1, DV2, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip

    i = recomputed(i)
    stored = tile * BLOCK_M + i < len_q
    dq_ptr += ((batch * T + first_row) * heads + head) * D
    store_columns(dq_ptr, dq1 * scale, i, heads * D, stored, 0, D1, D)
    if D2 > 0:
        store_columns(dq_ptr, dq2 * scale, i, heads * D, stored, D1, D2, D)
