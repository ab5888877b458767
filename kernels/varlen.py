"""Finding a program's sequence, and its pages, from numbers that lie in device memory.

They are read while kernels run, so nothing trusts them: a page that the cache does not have holds
no keys, and nothing is written to it; a sequence lies within the tokens, whatever cu_seqlens says.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_at(pages_ptr, index, wanted, n_pages):
    """(page, whether it is one of the cache's) of entries of a block table; 0 where it is not."""
    page = tl.load(pages_ptr + index, mask=wanted, other=-1)
    known = (page >= 0) & (page < n_pages)
    return tl.where(known, page, 0).to(tl.int64), known


@triton.jit
def page_known(pages_ptr, index, wanted, n_pages):
    """Whether an entry of a block table is a page of the cache, read apart from `page_at`.

    Apart, for what follows the products: where it uses the entry that addresses come from, the
    pipeline no longer reads that entry ahead. The modifier, which is the default, keeps the two
    reads from becoming one.
    """
    page = tl.load(pages_ptr + index, mask=wanted, other=-1, cache_modifier=".ca")
    return (page >= 0) & (page < n_pages)


@triton.jit
def within(begin, end, n_tokens):
    """[begin, end) cut to [0, n_tokens); empty where it runs backwards."""
    begin = tl.minimum(tl.maximum(begin, 0), n_tokens)
    return begin, tl.minimum(tl.maximum(end, begin), n_tokens)


@triton.jit
def rows_of(cu_seqlens_ptr, seq, n_seqs, n_tokens):
    """(first token, tokens) of a sequence; number n_seqs has the tokens that belong to nobody."""
    begin = tl.load(cu_seqlens_ptr + seq, mask=seq <= n_seqs, other=n_tokens)
    end = tl.load(cu_seqlens_ptr + seq + 1, mask=seq < n_seqs, other=n_tokens)
    begin, end = within(begin, end, n_tokens)
    return begin, end - begin


@triton.jit
def sequence_of_tile(
    cu_seqlens_ptr,
    tile,
    n_seqs,
    n_tokens,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(sequence, tile within it) for a tile counted over all sequences, each of ROWS rows a token.

    The tokens from cu_seqlens[n_seqs] to n_tokens, which belong to nobody, count as sequence
    n_seqs; a tile past them too has a larger one. BLOCK_S > n_seqs.
    """
    i = tl.arange(0, BLOCK_S)
    begin = tl.load(cu_seqlens_ptr + i, mask=i <= n_seqs, other=n_tokens)
    end = tl.load(cu_seqlens_ptr + i + 1, mask=i < n_seqs, other=n_tokens)
    begin, end = within(begin, end, n_tokens)
    n_tiles = tl.cdiv((end - begin) * ROWS, BLOCK_M)
    before = tl.cumsum(n_tiles, 0) <= tile
    return tl.sum(before.to(tl.int32)), tile - tl.sum(tl.where(before, n_tiles, 0))
