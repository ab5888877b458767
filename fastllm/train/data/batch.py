"""The micro batch: what one forward and backward pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastllm.nn.batch import Documents

NO_LOSS = -100  # the target of a place that is not trained on


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """T tokens of S documents and what to predict after each."""

    documents: Documents
    targets: Tensor  # [T] int64: the token to predict at each place; NO_LOSS: none
    tokens: int  # targets that count
    sources: NDArray[np.int64]  # [S, 3]: document, first target in it, places

    def to(self, device: torch.device | str) -> MicroBatch:
        """The batch with its tensors on `device`; copies from pinned memory do not wait."""
        d = self.documents
        moved = replace(
            d,
            ids=d.ids.to(device, non_blocking=True),
            positions=d.positions.to(device, non_blocking=True),
            cu_seqlens=d.cu_seqlens.to(device, non_blocking=True),
        )
        return replace(self, documents=moved, targets=self.targets.to(device, non_blocking=True))


def micro_batch(
    ids: NDArray[np.int32],
    targets: NDArray[np.int64],
    lengths: Sequence[int] | NDArray[np.int64],
    sources: NDArray[np.int64],
) -> MicroBatch:
    """The batch of documents laid end to end.

    ids: [T] int32. targets: [T] int64, NO_LOSS where nothing is trained. lengths: places of each
    of the S documents, summing to T. sources: [S, 3] int64, for people who look at the batch.
    """
    edges = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=edges[1:])
    positions = np.arange(len(ids), dtype=np.int32) - np.repeat(edges[:-1], lengths)
    return MicroBatch(
        documents=Documents(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(edges),
            max_seqlen=int(max(lengths, default=0)),
        ),
        targets=torch.from_numpy(targets),
        tokens=int(np.count_nonzero(targets != NO_LOSS)),
        sources=sources,
    )
