"""Quantized weights in Hugging Face directories in a layout of our own.

It is for what no other layout holds: K-quants, doubly quantized scales, mixes of formats. A module
holds, for a weight of n rows, the bytes of the layout of one row a group
(`fastllm.ops.packed_layout`), row by row:

    weight_codes   uint8 [n, bytes]
    weight_scales  uint8 [n, bytes]
    weight_format  uint8, the format's name; only where a `QuantLinear` was saved

and config.json says `quant_method: fastllm` and the format of each module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import packed_layout as layout
from ..ops.quant_format import BLOCK, format_of

PARTS = ("weight_codes", "weight_scales")
OPTIONAL = ("weight_format",)
VERSION = 1


def columns_of(format: str, width: int) -> int:
    """K of rows of so many bytes of codes. Raises ValueError if they are no whole blocks."""
    kind = format_of(format)
    block = 4 * kind.words
    if kind.dense or width % block or width // block * BLOCK % kind.multiple:
        raise ValueError(f"rows of {width} bytes are no whole blocks of {format}")
    return width // block * BLOCK


def from_files(tensors: Mapping[str, Tensor], format: str) -> tuple[Tensor, Tensor]:
    """(data, scales) of the layout of one row a group.

    Raises:
        ValueError: on an unknown format, bytes of another count, scales that are not finite.
    """
    codes, scales = (tensors[name] for name in PARTS)
    for name, tensor in zip(PARTS, (codes, scales), strict=True):
        if tensor.dtype != torch.uint8 or tensor.dim() != 2:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not rows of bytes")
    n, k = codes.shape[0], columns_of(format, codes.shape[1])
    expected = n, format_of(format).scale_bytes(k)
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"weight_scales has shape {list(scales.shape)}, {list(expected)} is expected"
        )
    data = codes.reshape(layout.data_shape(format, n, k, 1))
    typed = scales.reshape(-1).view(layout.scales_dtype(format))
    typed = typed.view(layout.scales_shape(format, n, k, 1))
    for part in layout.split_scales(typed, format, n, k):
        if not bool(torch.isfinite(part.float()).all()):
            raise ValueError("weight_scales holds NaN or infinity: the checkpoint is damaged")
    return data, typed


def to_files(data: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The inverse of `from_files`: (data, scales) have one row a group."""
    n = data.shape[0]
    return {
        name: tensor.reshape(-1).view(torch.uint8).view(n, -1)
        for name, tensor in zip(PARTS, (data, scales), strict=True)
    }


def config(formats: Mapping[str, str]) -> dict[str, Any]:
    """`quantization_config` of config.json: the format of each quantized module by its name."""
    return {"quant_method": "fastllm", "version": VERSION, "formats": dict(formats)}
