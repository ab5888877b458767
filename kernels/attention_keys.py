"""Which keys a program's rows see, how they are read and multiplied: parts of attention."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_compat import cast, dot
from .varlen import page_at, rows_of, sequence_of_tile


@triton.jit
def locate(
    tile,
    cu_seqlens_q_ptr,
    lengths_k_ptr,
    T,
    Tk,
    n_seqs,
    ROWS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(sequence, tile in it, batch entry, first token, tokens, first key, keys) of a tile.

    LAYOUT "batch": every sequence is a batch entry of T tokens and Tk keys. Else there is one entry
    of T tokens, cut by cu_seqlens_q; lengths_k is cu_seqlens_k over Tk keys ("varlen") or the
    cache's lengths ("paged"). A sequence of n_seqs or more has no keys.
    """
    if LAYOUT == "batch":
        per_sequence = tl.cdiv(T * ROWS, BLOCK_M)
        seq = tile // per_sequence
        tile = tile % per_sequence
        entry = seq.to(tl.int64)
        first, first_k = seq * 0, seq * 0
        n_tokens, len_k = first + T, first + Tk
    else:
        seq, tile = sequence_of_tile(cu_seqlens_q_ptr, tile, n_seqs, T, ROWS, BLOCK_M, BLOCK_S)
        entry = tl.full((), 0, tl.int64)
        known = seq < n_seqs
        first, n_tokens = rows_of(cu_seqlens_q_ptr, seq, n_seqs, T)
        if LAYOUT == "varlen":
            first_k, len_k = rows_of(lengths_k_ptr, seq, n_seqs, Tk)
            len_k = tl.where(known, len_k, 0)
        else:
            first_k = seq * 0
            len_k = tl.load(lengths_k_ptr + seq, mask=known, other=0)
    return seq, tile, entry, first, n_tokens, first_k, len_k


@triton.jit
def visible_range(first_position, last_position, len_k, left, right, LEFT, RIGHT):
    """[begin, end) of the keys that some query from the first to the last position sees."""
    begin, end = 0, len_k
    if LEFT:
        begin = tl.maximum(0, first_position - left)
    if RIGHT:
        end = tl.minimum(len_k, last_position + right + 1)
    return begin, end


@triton.jit
def hide(s, position, stored, q_position, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """s[M, N] with -inf for the keys that a row does not see."""
    visible = stored[None, :]
    if LEFT:
        visible &= position[None, :] >= (q_position - left)[:, None]
    if RIGHT:
        visible &= position[None, :] <= (q_position + right)[:, None]
    return tl.where(visible, s, float("-inf"))


@triton.jit
def key_rows(
    start,
    position,
    stored,
    pages_ptr,
    n_pages,
    kv_head,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(row of the tile's first key, offsets[N] from it, whether a stored key is there).

    Rows of the cache, where keys of a page that the cache has not are not there, or of a document.
    """
    n = tl.arange(0, BLOCK_N)
    if pages_ptr is None:
        # the interpreter's start is a Python int
        return tl.full((), 0, tl.int64) + start, n, stored
    elif PAGE % BLOCK_N == 0:
        page, known = page_at(pages_ptr, start // PAGE, True, n_pages)
        return (page * KV_HEADS + kv_head) * PAGE + start % PAGE, n, stored & known
    else:
        page, known = page_at(pages_ptr, position // PAGE, stored, n_pages)
        row = (page * KV_HEADS + kv_head) * PAGE + position % PAGE
        return tl.full((), 0, tl.int64), row, stored & known


@triton.jit
def product(a, b, acc):
    """acc + a @ b; fp32 a by bf16 b (codes) as a's three bf16 parts, 24 bits, smallest first."""
    if a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high = cast(a, tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = cast(rest, tl.bfloat16)
        low = cast(rest - middle.to(tl.float32), tl.bfloat16)
        return dot(high, b, dot(middle, b, dot(low, b, acc)))
    else:
        return dot(a, b, acc)


@triton.jit
def load_columns(rows, column, stored, WHOLE: tl.constexpr, D: tl.constexpr):
    """Columns of the rows at pointers rows[N, 1]; 0 in rows not stored and columns from D on."""
    if WHOLE:
        return tl.load(rows + column[None, :], mask=stored[:, None], other=0)
    else:
        mask = stored[:, None] & (column < D)[None, :]
        return tl.load(rows + column[None, :], mask=mask, other=0)
