"""fastllm: one set of CPU and GPU kernels under the whole life of a language model.

Heavy parts load on first use, so that `import fastllm` stays close to `import torch`.
"""

from __future__ import annotations

import importlib
from typing import Any

from .integrations import on_import

__version__ = "0.1.0"

# public name -> module that defines it
_LAZY = {
    "LLM": "fastllm.engine.llm",
    "AsyncLLM": "fastllm.engine.async_llm",
    "SamplingParams": "fastllm.engine.request",
    "RequestOutput": "fastllm.engine.request",
    "quantize_model": "fastllm.nn.quantize_model",
    "dequantize_model": "fastllm.nn.quantize_model",
    "set_batch_invariant": "fastllm.ops.registry",
    "patch": "fastllm.integrations.transformers",
    "unpatch": "fastllm.integrations.transformers",
    "patched": "fastllm.integrations.transformers",
    "verify": "fastllm.integrations.transformers",
    "QuantConfig": "fastllm.integrations.transformers",
    "load_gguf": "fastllm.integrations.transformers",
}
_SUBMODULES = ("ops", "nn", "models", "quantize", "engine", "graph", "integrations")

__all__ = ["__version__", *_LAZY, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"fastllm.{name}")
    raise AttributeError(f"module 'fastllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


on_import.wait()  # attn_implementation="fastllm" is known wherever transformers is imported too
