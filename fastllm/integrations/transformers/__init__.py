"""transformers models on our kernels: `patch` and its report, `verify`, quantized and GGUF models.

Names load on first use; transformers itself is an extra (`pip install fastllm-engine[bench]`).
"""

from __future__ import annotations

import importlib
from typing import Any

# public name -> module beside this one that defines it
_LAZY = {
    "patch": "patching",
    "unpatch": "patching",
    "patched": "patching",
    "OPS": "patching",
    "Report": "report",
    "Row": "report",
    "PatchError": "report",
    "verify": "verifying",
    "QuantConfig": "quant_config",
    "load_gguf": "gguf",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ImportError(
                f"{name} needs transformers: pip install 'fastllm-engine[bench]'"
            ) from error
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
