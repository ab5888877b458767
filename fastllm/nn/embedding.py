"""Token embedding: rows of a plain or packed table, in float32 like the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllm.ops.embedding import embedding, quant_embedding
from fastllm.quantize.packed import PackedWeight


class Embedding(nn.Module):
    """`weight` [vocab, hidden], or `packed`, which a tied LM head shares."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, device="meta")
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.packed: PackedWeight | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> float32 [..., hidden]."""
        if self.packed is None:
            assert self.weight is not None, "a loader sets the weight or packs it"
            return embedding(ids, self.weight, torch.float32)
        packed = self.packed
        return quant_embedding(
            ids, packed.data, packed.scales, packed.format, packed.n, torch.float32
        )
