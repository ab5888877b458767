"""The ops: `fastllm.ops.<op>` are public functions on tensors; one file per stem."""

from __future__ import annotations

from .rms_norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
