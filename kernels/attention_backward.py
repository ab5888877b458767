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
from .triton_compat import cast, dot, exp2, recomputed, tanh
from .tuning import AttentionBackwardTiles
from .varlen import sequence_of_tile

LOG2_E = tl.constexpr(1.4426950408889634)
SUM_BLOCK = 1024


# --- what the kernels share ---------------------------------------------------------------------


@triton.jit
def load_columns(
    ptr,
    rows,
    stride,
    live,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns FIRST .. FIRST + BLOCK of rows; zero past COLUMNS and, if MASKED, where not live."""
    columns = FIRST + tl.arange(0, BLOCK)
    at = ptr + rows[:, None] * stride + columns[None, :]
    if FIRST + BLOCK > COLUMNS:
        inside = (columns < COLUMNS)[None, :]
        if MASKED:
            inside = inside & live[:, None]
        x = tl.load(at, mask=inside, other=0.0)
    elif MASKED:
        x = tl.load(at, mask=live[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def dot_columns(a1, a2, b1, b2, acc, TWO: tl.constexpr):
    """acc + a @ b.T, of one block of columns or two."""
    acc = dot(a1, tl.trans(b1), acc)
    if TWO:
        acc = dot(a2, tl.trans(b2), acc)
    return acc


@triton.jit
def store_columns(
    ptr, x, rows, stride, live, FIRST: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes columns FIRST .. FIRST + BLOCK of the live rows, rounded to the pointer's dtype."""
    columns = FIRST + tl.arange(0, BLOCK)
    inside = live[:, None] & (columns < COLUMNS)[None, :]
    at = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(at, cast(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def document_of_tile(
    pid,
    cu_ptr,
    n_rows,
    cu_q_ptr,
    cu_k_ptr,
    T,
    T_k,
    n_docs,
    VARLEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(document, tile in it, first row of q, len_q, first key, len_k) of a program.

    Tiles are of the n_rows of cu_ptr, one of the other two. Packed rows past the last document
    are one more, n_docs, of which the other side is to be taken as empty; a program with a higher
    number has nothing to do.
    """
    if VARLEN:
        doc, tile = sequence_of_tile(cu_ptr, pid, n_docs, n_rows, 1, BLOCK, BLOCK_S)
        inside = doc < n_docs
        first_q = tl.load(cu_q_ptr + doc, mask=doc <= n_docs, other=T)
        first_k = tl.load(cu_k_ptr + doc, mask=doc <= n_docs, other=T_k)
        len_q = tl.load(cu_q_ptr + doc + 1, mask=inside, other=T) - first_q
        len_k = tl.load(cu_k_ptr + doc + 1, mask=inside, other=T_k) - first_k
    else:
        n_tiles = tl.num_programs(0) // n_docs
        doc, tile = pid // n_tiles, pid % n_tiles
        first_q, first_k = doc * 0, doc * 0
        len_q, len_k = first_q + T, first_k + T_k
    return doc, tile, first_q, len_q, first_k, len_k


@triton.jit
def tile_ranges(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """(first edge tile, edge tiles, first whole tile, whole tiles) over the rows [lo, hi).

    Whole tiles, of BLOCK rows, lie in [full_lo, full_hi), where nothing is hidden; the rows before
    and after them go in edge tiles of EDGE rows, see `edge_tile`.
    """
    begin = lo // EDGE
    end = tl.maximum(begin, tl.cdiv(tl.maximum(hi, 0), EDGE))
    full_begin = tl.cdiv(full_lo, BLOCK)
    n_full = tl.maximum(0, tl.maximum(full_hi, 0) // BLOCK - full_begin)
    return begin, end - begin - n_full * (BLOCK // EDGE), full_begin, n_full


@triton.jit
def edge_tile(at, begin, full_begin, n_full, RATIO: tl.constexpr):
    """The edge tile of a number: those before the whole tiles, each of RATIO edges, then others."""
    return begin + at + tl.where(begin + at < full_begin * RATIO, 0, n_full * RATIO)


@triton.jit
def exponent(s, lse2, to_tanh, to_exponent, SOFTCAP: tl.constexpr):
    """(log2 of P, derivative of the logit by the uncapped one) of the raw scores q.k.

    lse2 is the row's lse in base 2, +inf for a row that sees nothing: its P is 0.
    """
    if SOFTCAP:
        t = tanh(s * to_tanh)
        x = t * to_exponent - lse2
        slope = 1.0 - t * t
    else:
        x = s * to_exponent - lse2
        slope = 1.0
    return x, slope


@triton.jit
def in_window(ahead, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Visible? `ahead` is the query's key position minus the key's."""
    visible = ahead == ahead
    if HAS_LEFT:
        visible &= ahead <= window_left
    if HAS_RIGHT:
        visible &= ahead >= -window_right
    return visible


# --- rows: lse, delta, sinks --------------------------------------------------------------------


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


# --- keys: dK and dV ----------------------------------------------------------------------------


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


# --- queries: dQ --------------------------------------------------------------------------------


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


# --- launches -----------------------------------------------------------------------------------


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
    tiles = tiles or tuning.attention_backward_tiles(
        q.dtype, dim, value_dim, tuning.architecture(q.device)
    )
    varlen = cu_seqlens_q is not None
    n_docs = cu_seqlens_q.shape[0] - 1 if varlen else q.shape[0]
    grad_o, q, k, v = (_addressable(x) for x in (grad_o, q, k, v))
    # A window that reaches every key is none.
    window_left = -1 if window_left >= T_k else window_left
    window_right = -1 if window_right >= T else window_right
    d1, d2 = tuning.column_blocks(dim)
    dv1, dv2 = tuning.column_blocks(value_dim)
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
    tile = tuning.row_statistics_tile(dim)
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
