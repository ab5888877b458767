"""What a forward pass needs to know about its tokens: `Batch` to serve, `Documents` to train.

All of it lives in tensors that kernels read at run time, so one `Batch` describes prompts, chunks
of prompts, decode steps and captured graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """T tokens of S documents, laid end to end, without padding and without a cache.

    Documents do not see each other, and positions begin at 0 in each.
    """

    ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32: index of the token in its document
    cu_seqlens: Tensor  # [S + 1] int32: where each document begins, and the end of the last
    max_seqlen: int | None = None  # tokens of the longest document, where somebody counted them

    @classmethod
    def pack(
        cls, documents: Sequence[Sequence[int] | Tensor], device: torch.device | str = "cpu"
    ) -> Documents:
        """Lay token ids of several documents end to end.

        Raises ValueError if there is none, or one is empty.
        """
        rows = [torch.as_tensor(document, dtype=torch.int32).cpu() for document in documents]
        if not rows or any(row.dim() != 1 or not row.numel() for row in rows):
            raise ValueError("documents must be at least one, each a list of at least one token id")
        lengths = torch.tensor([0, *(row.numel() for row in rows)])
        return cls(
            ids=torch.cat(rows).to(device),
            positions=torch.cat([torch.arange(len(row), dtype=torch.int32) for row in rows]).to(
                device
            ),
            cu_seqlens=lengths.cumsum(0).to(device, torch.int32),
            max_seqlen=int(lengths.max()),
        )

    def to(self, device: torch.device | str) -> Documents:
        """The same documents on another device."""
        return Documents(
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            max_seqlen=self.max_seqlen,
        )
