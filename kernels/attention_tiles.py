"""What the kernels of attention's backward share: where a program works, what its rows see.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_compat import cast, dot, tanh
from .varlen import rows_of, sequence_of_tile


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
        first_q, len_q = rows_of(cu_q_ptr, doc, n_docs, T)
        first_k, len_k = rows_of(cu_k_ptr, doc, n_docs, T_k)
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
