"""Modules built from the ops. State dict names are Hugging Face's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllm.nn.quant_linear import QuantLinear

__all__ = ["QuantLinear"]


def __getattr__(name: str) -> Any:
    if name == "QuantLinear":
        from fastllm.nn.quant_linear import QuantLinear

        return QuantLinear
    raise AttributeError(f"module 'fastllm.nn' has no attribute {name!r}")
