"""The ops: `fastllm.ops.<op>` are public functions on tensors; one file per stem."""

from __future__ import annotations

from .embedding import embedding, quant_embedding
from .linear import linear
from .quant_matmul import quant_matmul
from .rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_rms_norm",
    "embedding",
    "linear",
    "quant_embedding",
    "quant_matmul",
    "rms_norm",
]
