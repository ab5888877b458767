"""Writing new keys and values into the pages of the cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .varlen import sequence_of_tile


@triton.jit
def append_kv_kernel(
    k_cache_ptr,
    v_cache_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    cu_seqlens_ptr,
    cache_seqlens_ptr,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    n_seqs,
    max_pages,
    KV_HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    t = tl.program_id(0)
    head = tl.program_id(1)
    seq, token = sequence_of_tile(cu_seqlens_ptr, t, n_seqs, 1, 1, BLOCK_S)
    if seq >= n_seqs:
        return
    cache_len = tl.load(cache_seqlens_ptr + seq)
    n_tokens = tl.load(cu_seqlens_ptr + seq + 1) - tl.load(cu_seqlens_ptr + seq)
    position = cache_len - n_tokens + token
    if (cache_len == 0) | (position < 0) | (position >= max_pages * PAGE):
        return
    page = tl.load(block_table_ptr + seq.to(tl.int64) * max_pages + position // PAGE)
    row = (page.to(tl.int64) * KV_HEADS + head) * PAGE + position % PAGE
    d = tl.arange(0, BLOCK_D)
    source = t.to(tl.int64)
    k = tl.load(k_ptr + source * stride_kt + head * stride_kh + d, mask=d < DK, other=0.0)
    tl.store(k_cache_ptr + row * DK + d, k, mask=d < DK)
    v = tl.load(v_ptr + source * stride_vt + head * stride_vh + d, mask=d < DV, other=0.0)
    tl.store(v_cache_ptr + row * DV + d, v, mask=d < DV)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
) -> None:
    """Writes token i of sequence s to position cache_seqlens[s] - len_q(s) + i of its pages.

    k[T, Hk, D], v[T, Hk, Dv]: any strides of T and Hk, K after RoPE; k_cache [pages, Hk,
    page_size, D] and v_cache [pages, Hk, page_size, Dv]: contiguous, of the same dtype; the rest
    as in `paged_attention`. Nothing is written for a dead slot.
    """
    n_tokens, kv_heads, dim_k = k.shape
    dim_v = v.shape[-1]
    if k.numel() == 0:
        return
    n_seqs, max_pages = block_table.shape
    append_kv_kernel[(n_tokens, kv_heads)](
        k_cache,
        v_cache,
        k,
        v,
        block_table,
        cu_seqlens_q,
        cache_seqlens,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        n_seqs,
        max_pages,
        KV_HEADS=kv_heads,
        DK=dim_k,
        DV=dim_v,
        PAGE=k_cache.shape[2],
        BLOCK_D=triton.next_power_of_2(max(dim_k, dim_v)),
        BLOCK_S=triton.next_power_of_2(n_seqs),
        num_warps=1,
    )
