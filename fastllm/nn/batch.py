"""What a forward pass needs to know about its tokens: `Batch` to serve, `Documents` to train.

All of it lives in tensors that kernels read at run time, so one `Batch` describes prompts, chunks
of prompts, decode steps and captured graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastllm.nn.rows import take_rows

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prefix, and what follows it


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

    Documents do not see each other, and positions begin at 0 in each; of documents that begin alike
    the common beginning may be there once (`pack_shared`).
    """

    ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32: index of the token in its document
    cu_seqlens: Tensor  # [S + 1] int32: where each document begins, and the end of the last
    max_seqlen: int | None = None  # tokens of the longest document, where somebody counted them
    # Where beginnings are shared: which of the T rows each document sees, document by document.
    seen: Tensor | None = None  # [K] int64
    cu_seqlens_seen: Tensor | None = None  # [S + 1] int32

    @classmethod
    def pack(
        cls, documents: Sequence[Sequence[int] | Tensor], device: torch.device | str = "cpu"
    ) -> Documents:
        """Lay token ids of several documents end to end.

        Raises ValueError if there is none, or one is empty.
        """
        rows = [
            torch.as_tensor(document, dtype=torch.int32, device="cpu") for document in documents
        ]
        if not rows or any(row.dim() != 1 or not row.numel() for row in rows):
            raise ValueError("documents must be at least one, each a list of at least one token id")
        places = [torch.arange(len(row), dtype=torch.int32, device="cpu") for row in rows]
        lengths = torch.tensor([0, *map(len, rows)], device="cpu")
        return cls(
            ids=torch.cat(rows).to(device),
            positions=torch.cat(places).to(device),
            cu_seqlens=lengths.cumsum(0).to(device, torch.int32),
            max_seqlen=int(lengths.max()),
        )

    @classmethod
    def pack_shared(
        cls, groups: Sequence[Group], device: torch.device | str = "cpu"
    ) -> tuple[Documents, list[Tensor]]:
        """Lay documents end to end, what several of them begin with once.

        Every token has the bits that it has in a document of its own; a group of n answers to one
        prompt goes through the model as one prompt and n answers.

        Args:
            groups: (prefix, suffixes) in token ids: the documents are prefix + suffix. A suffix may
                be empty.

        Returns:
            The documents, and for each suffix, in order, the rows `[len(suffix) + 1]` int64 of its
            document's end: row i predicts token i of the suffix, the last one follows all of it.

        Raises ValueError if there is no group, a prefix is empty, or a group has no suffix.
        """
        layout = _SharedLayout()
        for prefix, suffixes in groups:
            layout.add(prefix, suffixes)
        if not layout.rows:
            raise ValueError("groups must be at least one")
        seen = cu_seqlens_seen = None
        if layout.shared:
            seen = torch.tensor(layout.seen, device=device)
            cu_seqlens_seen = torch.tensor(layout.seen_edges, dtype=torch.int32, device=device)
        documents = cls(
            ids=torch.tensor(layout.ids, dtype=torch.int32, device=device),
            positions=torch.tensor(layout.positions, dtype=torch.int32, device=device),
            cu_seqlens=torch.tensor(layout.edges, dtype=torch.int32, device=device),
            max_seqlen=max(b - a for a, b in pairwise(layout.seen_edges)),
            seen=seen,
            cu_seqlens_seen=cu_seqlens_seen,
        )
        return documents, [torch.tensor(rows, device=device) for rows in layout.rows]

    def keys(self, x: Tensor) -> Tensor:
        """The rows of `x` `[T, ...]` that documents see, `[K, ...]`: x itself if none is shared."""
        return x if self.seen is None else take_rows(x, self.seen)

    def to(self, device: torch.device | str) -> Documents:
        """The same documents on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Documents(
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            max_seqlen=self.max_seqlen,
            seen=moved(self.seen),
            cu_seqlens_seen=moved(self.cu_seqlens_seen),
        )


class _SharedLayout:
    """Groups laid end to end: the prefix, if anybody shares it, and what follows it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.edges = [0]
        self.seen: list[int] = []  # rows that each document sees
        self.seen_edges = [0]
        self.rows: list[list[int]] = []  # of each suffix
        self.shared = False

    def add(self, prefix: Sequence[int], suffixes: Sequence[Sequence[int]]) -> None:
        if not len(prefix) or not len(suffixes):
            raise ValueError("a group must have a prefix of at least one token and a suffix")
        start, length = len(self.ids), len(prefix)
        if len(suffixes) == 1:
            self._document([*prefix, *suffixes[0]], range(0))
            self.rows.append(list(range(start + length - 1, len(self.ids))))
            return
        self.shared = True
        self._document(prefix, range(0))
        before = range(start, start + length)
        for suffix in suffixes:
            first = len(self.ids)
            self.rows.append([start + length - 1, *range(first, first + len(suffix))])
            if len(suffix):
                self._document(suffix, before)

    def _document(self, ids: Sequence[int], before: range) -> None:
        """One document's own rows, after those of a prefix that it sees too."""
        first = len(self.ids)
        self.ids += ids
        self.positions += range(len(before), len(before) + len(ids))
        self.edges.append(len(self.ids))
        self.seen += [*before, *range(first, len(self.ids))]
        self.seen_edges.append(len(self.seen))
