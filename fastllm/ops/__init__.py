"""The ops: `fastllm.ops.<op>` are public functions on tensors; one file per stem."""

from __future__ import annotations

from .embedding import embedding, quant_embedding
from .linear import linear
from .quant_matmul import quant_matmul
from .rms_norm import add_rms_norm, rms_norm
from .sampling import log_probs, sampling, top_log_probs

__all__ = [
    "add_rms_norm",
    "embedding",
    "linear",
    "log_probs",
    "quant_embedding",
    "quant_matmul",
    "rms_norm",
    "sampling",
    "top_log_probs",
]
