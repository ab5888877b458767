"""`QuantEmbedding`: an embedding of PyTorch with a packed table, for models that others define."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllm.nn.packed_matrix import PackedMatrix
from fastllm.ops.embedding import quant_embedding
from fastllm.quantize.packed import PackedWeight

_OUTPUTS = (torch.float32, torch.bfloat16)


class QuantEmbedding(PackedMatrix, nn.Embedding):  # type: ignore[override]
    """Rows of a quantized table, each dequantized in fp32 and rounded once; the table is frozen.

    `weight`, `state_dict` and moves are `PackedMatrix`'s. A `QuantLinear` may hold the very same
    parameters, as a tied LM head does. Outputs have the dtype of the table, `dtype`.
    """

    def __init__(
        self, packed: PackedWeight, dtype: torch.dtype, padding_idx: int | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = packed.n, packed.k
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._hold(packed, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """ids [...], int32 or int64 -> [..., embedding_dim].

        Raises ValueError on an id outside of the table, in an eager call on the CPU.
        """
        packed = self.packed_weight()
        made = self.dtype if self.dtype in _OUTPUTS else torch.float32
        y = quant_embedding(input, packed.data, packed.scales, self.format, packed.n, made)
        return y if made == self.dtype else y.to(self.dtype)

    def dequantize(self) -> nn.Embedding:
        """A plain table of the same values in `dtype`, frozen."""
        plain = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        plain.weight = nn.Parameter(self.weight.dequantize(), requires_grad=False)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"
