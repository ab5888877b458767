"""Finding a program's sequence from lengths that lie in device memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_of_tile(
    cu_seqlens_ptr, tile, n_seqs, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr
):
    """(sequence, tile within it) for a tile counted over all sequences, each of ROWS rows a token.

    The sequence is n_seqs or more for a tile past the last one.
    """
    i = tl.arange(0, BLOCK_S)
    begin = tl.load(cu_seqlens_ptr + i, mask=i < n_seqs, other=0)
    end = tl.load(cu_seqlens_ptr + i + 1, mask=i < n_seqs, other=0)
    n_tiles = tl.cdiv((end - begin) * ROWS, BLOCK_M)
    before = tl.cumsum(n_tiles, 0) <= tile
    return tl.sum(before.to(tl.int32)), tile - tl.sum(tl.where(before, n_tiles, 0))
