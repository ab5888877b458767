"""GGUF block formats: sizes, and reference conversion between packed bytes and float32.

A quantized row is a sequence of blocks of 32 values, each with its own fp16 scale d:

    q4_0: d, 16 bytes     value = d * (q - 8)
    q4_1: d, m, 16 bytes  value = d * q + m
    q8_0: d, 32 int8      value = d * q

Byte j of the 4-bit formats holds column j in its low and column 16 + j in its high nibble.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
QUANTIZED_FORMATS = ("q4_0", "q4_1", "q8_0")
SUPPORTED_FORMATS = (*DENSE_DTYPES, *QUANTIZED_FORMATS)


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
    blocks = data.reshape(-1, kind.nbytes)
    return _DEQUANTIZERS[format](blocks).reshape(*data.shape[:-1], columns)


def quantize(format: str, x: Tensor) -> Tensor:
    """float32 [..., columns] -> packed bytes uint8 [..., bytes_per_row], round to nearest.

    Raises ValueError on values that are not finite or too large for an fp16 scale.
    """
    kind = block_type(format)
    if x.dtype != torch.float32 or x.dim() == 0:
        raise ValueError(f"x must be a float32 tensor of rows, got {x.dtype} {x.shape}")
    width = row_bytes(format, x.shape[-1])
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinity and cannot be quantized")
    if format in DENSE_DTYPES:
        packed = x.to(DENSE_DTYPES[format]).contiguous().view(torch.uint8)
    else:
        blocks = _QUANTIZERS[format](x.reshape(-1, kind.values))
        packed = blocks.reshape(*x.shape[:-1], width)
    return packed


def _half(blocks: Tensor, start: int) -> Tensor:
    """The fp16 at byte `start` of every block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """[blocks, 16] bytes -> [blocks, 32] float32 codes in column order."""
    return torch.cat([codes & 0x0F, codes >> 4], dim=1).float()


def _dequantize_q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _dequantize_q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _dequantize_q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where scale is 0 or so small that the reciprocal overflows."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def _half_bytes(x: Tensor) -> Tensor:
    """float32 [blocks, 1] -> the bytes of its fp16, uint8 [blocks, 2]."""
    half = x.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError("x holds values too large for the fp16 scale of a block")
    return half.view(torch.uint8)


def _pack_nibbles(codes: Tensor) -> Tensor:
    codes = codes.clamp(0, 15).to(torch.uint8)
    return codes[:, :16] | (codes[:, 16:] << 4)


def _quantize_q4_0(x: Tensor) -> Tensor:
    # The value of largest magnitude, sign kept, becomes code 0 = -8: it is represented exactly.
    peak = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    d = peak / -8
    codes = (x * _reciprocal(d) + 8.5).trunc()
    return torch.cat([_half_bytes(d), _pack_nibbles(codes)], dim=1)


def _quantize_q4_1(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=1, keepdim=True)
    d = (high - low) / 15
    codes = ((x - low) * _reciprocal(d) + 0.5).trunc()
    return torch.cat([_half_bytes(d), _half_bytes(low), _pack_nibbles(codes)], dim=1)


def _quantize_q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(dim=1, keepdim=True) / 127
    scaled = x * _reciprocal(d)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    whole = whole + (magnitude - whole >= 0.5)  # halves go away from zero, as in the format
    codes = torch.copysign(whole, scaled).to(torch.int8)
    return torch.cat([_half_bytes(d), codes.view(torch.uint8)], dim=1)


_DEQUANTIZERS = {"q4_0": _dequantize_q4_0, "q4_1": _dequantize_q4_1, "q8_0": _dequantize_q8_0}
_QUANTIZERS = {"q4_0": _quantize_q4_0, "q4_1": _quantize_q4_1, "q8_0": _quantize_q8_0}
