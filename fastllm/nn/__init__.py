"""Modules built from the ops. State dict names are Hugging Face's.

Those named here are for models that others define: see docs/dropin.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllm.nn.cross_entropy import LinearCrossEntropyLoss
    from fastllm.nn.norm import RMSNorm
    from fastllm.nn.quant_linear import QuantLinear
    from fastllm.nn.sparse_mlp import MoE

# public name -> module that defines it
_LAZY = {
    "RMSNorm": "fastllm.nn.norm",
    "MoE": "fastllm.nn.sparse_mlp",
    "QuantLinear": "fastllm.nn.quant_linear",
    "LinearCrossEntropyLoss": "fastllm.nn.cross_entropy",
}

__all__ = ["LinearCrossEntropyLoss", "MoE", "QuantLinear", "RMSNorm"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastllm.nn' has no attribute {name!r}")
