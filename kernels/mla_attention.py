"""Attention over the compressed pages of multi-head latent attention: one KV row for all heads.

A program takes BLOCK_M query rows (row = token * heads + head) and walks the rows of the cache in
tiles of 64 positions. A row is a latent and, behind it, a rotated key. A tile of latents is
loaded once and serves twice: transposed as keys and as it lies as values. Scores are the sum of
two products, latent and rotated part, so that 576 columns are 512 + 64 and not padded to 1,024.
Splits of 512 positions are merged as in `paged_attention`, by the same functions: what that
module's docstring says of a row's bits holds here too.

Numerics: q, rows and P = exp(s - m) in the cache dtype, sums and m in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .attention_forward import combine_splits_kernel
from .attention_keys import locate
from .attention_tuning import mla_tile
from .online_softmax import LOG2_E, SPLIT_POSITIONS, finish, merge_splits, update
from .triton_compat import cast, dot
from .varlen import page_at, page_known, rows_of, sequence_of_tile


@triton.jit
def load_columns(ptr, offsets, rows_wanted, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns d < D of the wanted rows, 0 elsewhere."""
    if BLOCK == D:
        return tl.load(ptr + offsets, mask=rows_wanted[:, None], other=0.0)
    return tl.load(ptr + offsets, mask=rows_wanted[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def mla_attention_kernel(
    o_ptr,
    partial_ptr,
    m_ptr,
    l_ptr,
    q_ptr,
    cache_ptr,
    block_table_ptr,
    cu_seqlens_ptr,
    cache_seqlens_ptr,
    stride_qt,
    stride_qh,
    T,
    n_seqs,
    max_pages,
    n_pages,
    factor,
    H: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    seq, tile, _, first_token, n_tokens, _, cache_len = locate(
        tl.program_id(0), cu_seqlens_ptr, cache_seqlens_ptr, T, 0, n_seqs, H, "paged", BLOCK_M,
        BLOCK_S,
    )  # fmt: skip
    if seq > n_seqs:
        return
    tile = tl.cdiv(n_tokens * H, BLOCK_M) - 1 - tile  # the longest rows start first

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < n_tokens * H
    token = tl.minimum(rows // H, n_tokens - 1)
    head = rows % H
    q_position = cache_len - n_tokens + token
    t = (first_token + token).to(tl.int64)
    dv, dr = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)

    # Positions that some row of the tile can see: [k_begin, k_end).
    k_end = tl.minimum(cache_len, cache_len - n_tokens + (tile * BLOCK_M + BLOCK_M - 1) // H + 1)
    k_end = tl.minimum(k_end, max_pages * PAGE)
    k_begin = 0  # k_end is 0 or less where nothing is seen: a dead slot, tokens of no sequence
    split = tl.program_id(1)
    if MERGE == "kernel":
        k_begin = split * SPLIT
        k_end = tl.minimum(k_end, k_begin + SPLIT)
        if k_begin >= k_end:
            return

    q_rows = (t * stride_qt + head * stride_qh)[:, None]
    q_latent = load_columns(q_ptr, q_rows + dv[None, :], live, dv, V, BLOCK_V)
    q_rotated = load_columns(q_ptr + V, q_rows + dr[None, :], live, dr, R, BLOCK_R)
    kv = tl.arange(0, TILE)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    m_done, l_done, acc_done = m, total, acc

    for k_tile in range(k_begin // TILE, tl.cdiv(k_end, TILE)):
        if MERGE == "registers":
            if k_tile % (SPLIT // TILE) == 0:
                m_done, l_done, acc_done = merge_splits(m_done, l_done, acc_done, m, total, acc)
                m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_M,), tl.float32)
                acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        start = k_tile * TILE
        entry = seq.to(tl.int64) * max_pages + start // PAGE
        page, known = page_at(block_table_ptr, entry, True, n_pages)
        position = start + kv
        # Rows past the sequence's end hold whatever was there: 0 * NaN would reach the output.
        stored = (position < cache_len) & known
        base = cache_ptr + (page * PAGE + start % PAGE) * (V + R)
        kv_rows = kv[:, None] * (V + R)
        latent = load_columns(base, kv_rows + dv[None, :], stored, dv, V, BLOCK_V)
        rotated = load_columns(base + V, kv_rows + dr[None, :], stored, dr, R, BLOCK_R)
        s = dot(q_latent, tl.trans(latent), tl.zeros((BLOCK_M, TILE), tl.float32))
        s = dot(q_rotated, tl.trans(rotated), s)
        visible = position[None, :] <= q_position[:, None]
        visible &= page_known(block_table_ptr, entry, True, n_pages)
        s = tl.where(visible, s * factor, float("-inf"))
        p, alpha, m, total = update(s, m, total, 1.0)
        acc = dot(cast(p, latent.dtype), latent, acc * alpha[:, None])

    out_row = (split.to(tl.int64) * T + t) * H + head
    out_offsets = out_row[:, None] * V + dv[None, :]
    mask_o = live[:, None] & (dv < V)[None, :]
    if MERGE == "kernel":
        tl.store(m_ptr + out_row, m, mask=live)
        tl.store(l_ptr + out_row, total, mask=live)
        tl.store(partial_ptr + out_offsets, acc, mask=mask_o)
    else:
        if MERGE == "registers":
            m, total, acc = merge_splits(m_done, l_done, acc_done, m, total, acc)
        share, _ = finish(m, total, None)
        o = cast(acc * share[:, None], o_ptr.dtype.element_ty)
        tl.store(o_ptr + out_offsets, o, mask=mask_o)


@triton.jit
def append_mla_kernel(
    cache_ptr,
    latent_ptr,
    rope_key_ptr,
    block_table_ptr,
    cu_seqlens_ptr,
    cache_seqlens_ptr,
    stride_latent,
    stride_rope_key,
    T,
    n_seqs,
    max_pages,
    n_pages,
    V: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    t = tl.program_id(0)
    seq, token = sequence_of_tile(cu_seqlens_ptr, t, n_seqs, T, 1, 1, BLOCK_S)
    if seq >= n_seqs:
        return
    cache_len = tl.load(cache_seqlens_ptr + seq)
    _, n_tokens = rows_of(cu_seqlens_ptr, seq, n_seqs, T)
    position = cache_len - n_tokens + token
    if (cache_len == 0) | (position < 0) | (position >= max_pages * PAGE):
        return
    entry = seq.to(tl.int64) * max_pages + position // PAGE
    page, known = page_at(block_table_ptr, entry, True, n_pages)
    if not known:
        return
    row = cache_ptr + (page * PAGE + position % PAGE) * (V + R)
    source = t.to(tl.int64)
    d = tl.arange(0, BLOCK_V)
    latent = tl.load(latent_ptr + source * stride_latent + d, mask=d < V, other=0.0)
    tl.store(row + d, latent, mask=d < V)
    d = tl.arange(0, BLOCK_R)
    rope_key = tl.load(rope_key_ptr + source * stride_rope_key + d, mask=d < R, other=0.0)
    tl.store(row + V + d, rope_key, mask=d < R)


def mla_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    value_dim: int,
    softmax_scale: float,
    *,
    batch_invariant: bool = True,
) -> Tensor:
    """o[T, H, value_dim]: causal attention of each sequence's last tokens over its cache.

    q[T, H, D]: any strides of T and H; cache [pages, page_size, D]: q's dtype, contiguous,
    page_size a power of two from 16; value_dim < D; block_table[S, P], cu_seqlens_q[S + 1],
    cache_seqlens[S]: int32 in device memory, read there alone. cache_seqlens includes this step's
    tokens; 0 marks a dead slot, whose rows are 0. T must be cu_seqlens_q[S]. Positions of a page
    that the cache has not, or past the block table, are not seen.
    """
    n_tokens, n_heads, dim = q.shape
    page = cache.shape[1]
    n_seqs, max_pages = block_table.shape
    o = torch.empty((n_tokens, n_heads, value_dim), dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    max_keys = max_pages * page
    n_splits = max(1, triton.cdiv(max_keys, SPLIT_POSITIONS))
    arch = tuning.architecture(q.device)
    tile = mla_tile(n_tokens, n_heads, n_seqs, n_splits, q.dtype, arch, batch_invariant)
    m = total = partial = None
    if tile.merge == "kernel":
        stats = torch.empty((2, n_splits, n_tokens, n_heads), dtype=torch.float32, device=q.device)
        m, total = stats[0], stats[1]
        partial = torch.empty((n_splits, *o.shape), dtype=torch.float32, device=q.device)
    block_s = triton.next_power_of_2(n_seqs + 1)
    block_v = max(16, triton.next_power_of_2(value_dim))
    # At least the tiles of all sequences and of the tokens that belong to none.
    n_tiles = n_tokens * n_heads // tile.m + n_seqs + 1
    mla_attention_kernel[(n_tiles, n_splits if tile.merge == "kernel" else 1)](
        o, partial, m, total, q, cache, block_table, cu_seqlens_q, cache_seqlens,
        q.stride(0), q.stride(1), n_tokens, n_seqs, max_pages, cache.shape[0],
        softmax_scale * LOG2_E,
        H=n_heads,
        V=value_dim,
        R=dim - value_dim,
        PAGE=page,
        TILE=min(page, tile.n),
        SPLIT=SPLIT_POSITIONS,
        MERGE=tile.merge,
        BLOCK_M=tile.m,
        BLOCK_V=block_v,
        BLOCK_R=max(16, triton.next_power_of_2(dim - value_dim)),
        BLOCK_S=block_s,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    if tile.merge == "kernel":
        combine_splits_kernel[(n_tokens, n_heads)](
            o, None, partial, m, total, cu_seqlens_q, cache_seqlens, None,
            n_tokens, max_keys, n_tokens * n_heads, n_seqs, -1, 0,
            LAYOUT="paged",
            LEFT=False,
            RIGHT=True,
            H=n_heads,
            DV=value_dim,
            SPLIT=SPLIT_POSITIONS,
            BLOCK_DV=block_v,
            BLOCK_S=block_s,
            num_warps=1,
        )  # fmt: skip
    return o


def append_mla(
    latent: Tensor,
    rope_key: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
) -> None:
    """Writes token i of sequence s to position cache_seqlens[s] - len_q(s) + i of its pages.

    latent[T, V] and rope_key[T, R]: rows contiguous, any distance; cache [pages, page_size, V + R]:
    contiguous, of the same dtype; the rest as in `mla_attention`. Nothing is written for a dead
    slot, nor to a page that the cache has not.
    """
    n_tokens, value_dim = latent.shape
    rope_dim = rope_key.shape[1]
    if n_tokens == 0:
        return
    n_seqs, max_pages = block_table.shape
    append_mla_kernel[(n_tokens,)](
        cache, latent, rope_key, block_table, cu_seqlens_q, cache_seqlens,
        latent.stride(0), rope_key.stride(0), n_tokens, n_seqs, max_pages,
        cache.shape[0],
        V=value_dim,
        R=rope_dim,
        PAGE=cache.shape[1],
        BLOCK_V=triton.next_power_of_2(value_dim),
        BLOCK_R=triton.next_power_of_2(max(rope_dim, 1)),
        BLOCK_S=triton.next_power_of_2(n_seqs + 1),
        num_warps=1,
    )  # fmt: skip
