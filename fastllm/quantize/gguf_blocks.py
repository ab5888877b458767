"""GGUF block formats: sizes, and reference conversion between packed bytes and float32.

A quantized row is a sequence of blocks of 32 values, K-quants' of 256; their layouts are in
`gguf_codes`, what codes and scales mean in `fastllm.ops.quant_format`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import packed_layout as layout
from ..ops.quantize import quantize as packed_quantize
from .gguf_codes import GGUF_FORMATS, join_blocks, split_blocks


@dataclass(frozen=True, slots=True)
class BlockType:
    """How one GGUF tensor type is laid out: `nbytes` bytes for each `values` values."""

    name: str
    values: int
    nbytes: int

    @property
    def format(self) -> str:
        """The name used inside the package: lower case."""
        return self.name.lower()


# ids and sizes as fixed by the GGUF specification; ids that are absent were withdrawn from it
GGUF_TYPES: dict[int, BlockType] = {
    number: BlockType(name, values, nbytes)
    for number, name, values, nbytes in [
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2),
        (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8), (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    ]
}  # fmt: skip
TYPE_IDS: dict[str, int] = {kind.format: number for number, kind in GGUF_TYPES.items()}

DENSE_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
QUANTIZED_FORMATS = GGUF_FORMATS
SUPPORTED_FORMATS = (*DENSE_DTYPES, *QUANTIZED_FORMATS)
# Formats that `quantize` writes with the bytes of llama.cpp.
QUANTIZERS = (*DENSE_DTYPES, "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def block_type(format: str) -> BlockType:
    """Sizes of a supported format. Raises ValueError for any other name."""
    if format not in SUPPORTED_FORMATS:
        raise ValueError(
            f"format {format!r} is not supported; supported: {', '.join(SUPPORTED_FORMATS)}"
        )
    return GGUF_TYPES[TYPE_IDS[format]]


def row_bytes(format: str, columns: int) -> int:
    """Bytes of a row of `columns` values. Raises ValueError if they do not fill whole blocks."""
    kind = block_type(format)
    if columns < 0 or columns % kind.values:
        raise ValueError(f"{format} needs rows of a multiple of {kind.values}, got {columns}")
    return columns // kind.values * kind.nbytes


def dequantize(format: str, data: Tensor) -> Tensor:
    """Packed bytes uint8 [..., bytes_per_row] -> float32 [..., columns], exactly as defined."""
    kind = block_type(format)
    if data.dtype != torch.uint8 or data.dim() == 0:
        raise ValueError(f"data must be a uint8 tensor of rows, got {data.dtype} {data.shape}")
    if data.shape[-1] % kind.nbytes:
        raise ValueError(
            f"data rows of {data.shape[-1]} bytes are not whole {format} blocks of {kind.nbytes}"
        )
    data = data.contiguous()
    if format in DENSE_DTYPES:
        return data.view(DENSE_DTYPES[format]).float()
    columns = data.shape[-1] // kind.nbytes * kind.values
    codes, parts = split_blocks(format, data.reshape(-1, 1, kind.nbytes))
    return layout.dequantize_parts(codes, parts, format).reshape(*data.shape[:-1], columns)


def quantize(format: str, x: Tensor) -> Tensor:
    """float32 [..., columns] -> packed bytes uint8 [..., bytes_per_row].

    Formats of 32 columns have the bytes of llama.cpp's rule; K-quants' scales are searched (see
    `fastllm.ops.quantize`).

    Raises ValueError on values that are not finite or too large for an fp16 scale.
    """
    if x.dtype != torch.float32 or x.dim() == 0:
        raise ValueError(f"x must be a float32 tensor of rows, got {x.dtype} {x.shape}")
    width = row_bytes(format, x.shape[-1])
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinity and cannot be quantized")
    if format in DENSE_DTYPES:
        return x.to(DENSE_DTYPES[format]).contiguous().view(torch.uint8)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    data, scales = packed_quantize(rows, format)
    codes = layout.stored_codes(data, format, rows.shape[0])
    parts = layout.split_scales(scales, format, *rows.shape)
    return join_blocks(format, codes, parts).reshape(*x.shape[:-1], width)
