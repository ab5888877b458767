"""Writing new keys and values into the pages of the cache, as they are or as int8 codes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_compat import divide, round_even
from .varlen import page_at, rows_of, sequence_of_tile


@triton.jit
def store_row(cache_ptr, scales_ptr, row, x, d, DIM: tl.constexpr):
    """Writes x[BLOCK], the new values of a row of DIM columns; d: its columns.

    With scales: scale = amax|x| / 127, code = x / scale rounded to even, within +-127 (the quotient
    of the largest value can round up past 127).
    """
    if scales_ptr is not None:
        x = x.to(tl.float32)
        scale = divide(tl.max(tl.abs(x), axis=0), 127.0)
        x = divide(x, tl.where(scale > 0, scale, 1.0))
        x = tl.minimum(tl.maximum(round_even(x), -127.0), 127.0).to(tl.int8)
        tl.store(scales_ptr + row, scale)
    tl.store(cache_ptr + row * DIM + d, x, mask=d < DIM)


@triton.jit
def append_kv_kernel(
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    cu_seqlens_ptr,
    cache_seqlens_ptr,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    n_tokens,
    n_seqs,
    max_pages,
    n_pages,
    KV_HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    t = tl.program_id(0)
    head = tl.program_id(1)
    seq, token = sequence_of_tile(cu_seqlens_ptr, t, n_seqs, n_tokens, 1, 1, BLOCK_S)
    if seq >= n_seqs:
        return
    cache_len = tl.load(cache_seqlens_ptr + seq)
    _, n_new = rows_of(cu_seqlens_ptr, seq, n_seqs, n_tokens)
    position = cache_len - n_new + token
    if (cache_len == 0) | (position < 0) | (position >= max_pages * PAGE):
        return
    entry = seq.to(tl.int64) * max_pages + position // PAGE
    page, known = page_at(block_table_ptr, entry, True, n_pages)
    if not known:
        return
    row = (page * KV_HEADS + head) * PAGE + position % PAGE
    d = tl.arange(0, BLOCK_D)
    source = t.to(tl.int64)
    k = tl.load(k_ptr + source * stride_kt + head * stride_kh + d, mask=d < DK, other=0.0)
    store_row(k_cache_ptr, k_scales_ptr, row, k, d, DK)
    v = tl.load(v_ptr + source * stride_vt + head * stride_vh + d, mask=d < DV, other=0.0)
    store_row(v_cache_ptr, v_scales_ptr, row, v, d, DV)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Writes token i of sequence s to position cache_seqlens[s] - len_q(s) + i of its pages.

    k[T, Hk, D], v[T, Hk, Dv]: any strides of T and Hk, K after RoPE; k_cache [pages, Hk,
    page_size, D] and v_cache [pages, Hk, page_size, Dv]: contiguous, of the same dtype, or int8
    with k_scales, v_scales[pages, Hk, page_size], fp32, written too; the rest as in
    `paged_attention`. Nothing is written for a dead slot, nor to a page that the cache has not.
    """
    n_tokens, kv_heads, dim_k = k.shape
    dim_v = v.shape[-1]
    if k.numel() == 0:
        return
    n_seqs, max_pages = block_table.shape
    append_kv_kernel[(n_tokens, kv_heads)](
        k_cache,
        v_cache,
        k_scales,
        v_scales,
        k,
        v,
        block_table,
        cu_seqlens_q,
        cache_seqlens,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        n_tokens,
        n_seqs,
        max_pages,
        k_cache.shape[0],
        KV_HEADS=kv_heads,
        DK=dim_k,
        DV=dim_v,
        PAGE=k_cache.shape[2],
        BLOCK_D=triton.next_power_of_2(max(dim_k, dim_v)),
        BLOCK_S=triton.next_power_of_2(n_seqs + 1),
        num_warps=1,
        enable_fp_fusion=False,  # round_even asks for it
    )
