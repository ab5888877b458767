"""What a forward pass needs to know about its tokens.

All of it lives in tensors that kernels read at run time, so one description serves prompts, chunks
of prompts, decode steps and captured graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """T tokens of S sequences, laid end to end, without padding.

    A sequence whose `cache_seqlens` is 0 is a dead slot: nothing is written, its rows are unused.
    """

    ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32: index of the token in its sequence
    cu_seqlens_q: Tensor  # [S + 1] int32: where each sequence's tokens begin
    cache_seqlens: Tensor  # [S] int32: positions in the cache, this step's included
    block_table: Tensor  # [S, P] int32: pages of each sequence
    fresh: bool = False  # nothing was cached before: every sequence's tokens are all of it
