"""Finding a program's sequence from lengths that lie in device memory."""

from __future__ import annotations

import triton
import triton.language as tl


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
    n_tiles = tl.cdiv((end - begin) * ROWS, BLOCK_M)
    before = tl.cumsum(n_tiles, 0) <= tile
    return tl.sum(before.to(tl.int32)), tile - tl.sum(tl.where(before, n_tiles, 0))
