"""The packed weight formats as kernels see them: one row a group (R = 1), K a multiple of 32.

data uint8 [N, K/32, W, 1, 4]: 4 W bytes for 32 columns, W being the bits of a code. Bytes 0..15 of
codes under 8 bits hold the low 4 bits, byte j of columns j (low nibble) and 16 + j; the other words
bit 4 (5 bits: bit 8 (c % 4) + c / 4 of column c) or bits 4 and 5 (6 bits: 8 (c % 4) + 2 (c / 4) of
columns c below 16, and a second word for the others). Scales are rows of what `scales` names:

    half, half_min, half_zero  fp16 d, or d and m, or d and z with m = -(d z), for `group` columns
    float                      fp32 d for `group` columns, or (group 0) for the row
    super_min                  20 bytes for 256 columns: fp16 d, dmin, then 8 x (u8 sc, u8 mn)
    super                      18 bytes for 256 columns: fp16 d, then 16 x int8 sc
    double                     fp32 for the row, then a byte for 64 columns, padded to 4 bytes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quant_decode import (
    decode_bytes,
    decode_e4m3,
    decode_nf4,
    decode_nf4_pairs,
    decode_pairs,
)
from .triton_compat import cast


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """codes: "unsigned" (minus offset), "int8", "nf4" or "e4m3"; the rest as in the file's head."""

    bits: int
    group: int
    codes: str
    scales: str
    offset: int = 0


FORMATS = {
    "q4_0": PackedFormat(4, 32, "unsigned", "half", 8),
    "q4_1": PackedFormat(4, 32, "unsigned", "half_min"),
    "q5_0": PackedFormat(5, 32, "unsigned", "half", 16),
    "q5_1": PackedFormat(5, 32, "unsigned", "half_min"),
    "q8_0": PackedFormat(8, 32, "int8", "half"),
    "q4_k": PackedFormat(4, 32, "unsigned", "super_min"),
    "q5_k": PackedFormat(5, 32, "unsigned", "super_min"),
    "q6_k": PackedFormat(6, 16, "unsigned", "super", 32),
    "int4_g32": PackedFormat(4, 32, "unsigned", "half", 8),
    "int4_g64": PackedFormat(4, 64, "unsigned", "half", 8),
    "int4_g128": PackedFormat(4, 128, "unsigned", "half", 8),
    "int4_asym_g32": PackedFormat(4, 32, "unsigned", "half_zero"),
    "int4_asym_g64": PackedFormat(4, 64, "unsigned", "half_zero"),
    "int4_asym_g128": PackedFormat(4, 128, "unsigned", "half_zero"),
    "int8": PackedFormat(8, 0, "int8", "float"),
    "nf4": PackedFormat(4, 64, "nf4", "float"),
    "nf4_dq": PackedFormat(4, 64, "nf4", "double"),
    "fp8": PackedFormat(8, 0, "e4m3", "float"),
    "fp8_block": PackedFormat(8, 128, "e4m3", "float"),
}
DENSE = ("bf16", "f32")
WIDEST_UNIT = 128  # columns that are summed before they are scaled, where a scale serves more


def kernel_format(format: str) -> str:
    """The format whose kernels serve this one: the first of the same layout and values."""
    return next(name for name, packed in FORMATS.items() if packed == FORMATS[format])


def modes(format: str) -> tuple[str, ...]:
    """How `quant_matmul` multiplies rows with this format."""
    return "fp8" if FORMATS[format].codes == "e4m3" else "int8", "bf16", "fp32"


@triton.constexpr_function
def kind(format, field):
    """One field of a format's description."""
    return getattr(FORMATS[format], field)


@triton.constexpr_function
def has_minimum(format):
    """Whether values have an additive part."""
    return FORMATS[format].scales in ("half_min", "half_zero", "super_min")


@triton.constexpr_function
def group_blocks(format):
    """Blocks of 32 columns under a scale; 1 where it is the row's, which is found otherwise."""
    return max(1, FORMATS[format].group // 32)


@triton.constexpr_function
def block_bytes(format):
    """Bytes of the codes of 32 columns."""
    return 4 * FORMATS[format].bits


@triton.constexpr_function
def unit_columns(format, mode):
    """Columns that a kernel multiplies at once: one scale's, 32 at least and 128 at most.

    In mode int8 always 32; q6_k, whose scales serve 16, has two in a unit.
    """
    if mode == "int8":
        return 32
    return max(32, min(FORMATS[format].group or WIDEST_UNIT, WIDEST_UNIT))


@triton.jit
def scale_stride(n_blocks, FORMAT: tl.constexpr):
    """Elements of a row's scales, K = 32 n_blocks."""
    SCALES: tl.constexpr = kind(FORMAT, "scales")
    GROUP: tl.constexpr = kind(FORMAT, "group")
    if SCALES == "super_min":
        return n_blocks // 8 * 20
    elif SCALES == "super":
        return n_blocks // 8 * 18
    elif SCALES == "double":
        return 4 + (n_blocks // 2 + 3) // 4 * 4
    elif GROUP == 0:
        return 1
    else:
        BLOCKS: tl.constexpr = GROUP // 32
        groups = (n_blocks + BLOCKS - 1) // BLOCKS
        return groups if SCALES == "half" or SCALES == "float" else groups * 2


@triton.jit
def weight_rows(data_ptr, scales_ptr, rows, n_blocks, FORMAT: tl.constexpr):
    """Where the codes and the scales of rows begin."""
    wide = rows.to(tl.int64)
    data = data_ptr + wide * n_blocks * block_bytes(FORMAT)
    return data, scales_ptr + wide * scale_stride(n_blocks, FORMAT)


@triton.jit
def load_as(ptr, mask, dtype: tl.constexpr):
    """Loads another type than ptr's, 0 where mask is false."""
    return tl.load(ptr.to(tl.pointer_type(dtype), bitcast=True), mask=mask, other=0)


@triton.jit
def half_bits(bits):
    """fp32 of the fp16 whose bits are the low half of uint32."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def row_scales(scale_rows, mask, FORMAT: tl.constexpr):
    """fp32 scales of whole rows, in the shape of scale_rows; 0.0 in formats that have none."""
    if kind(FORMAT, "scales") == "double":
        return load_as(scale_rows, mask, tl.float32)
    elif kind(FORMAT, "group") == 0:
        return tl.load(scale_rows, mask=mask, other=0.0)
    else:
        return 0.0


@triton.jit
def group_scales(scale_rows, row_scale, group, mask, FORMAT: tl.constexpr):
    """(d, m) of groups of columns, fp32; m is 0.0 where there is none. Not for q6_k.

    scale_rows, row_scale, group: shapes that broadcast to mask's; group counts from the row's
    first column. d is rounded once (nf4_dq), products that make m are exact.
    """
    SCALES: tl.constexpr = kind(FORMAT, "scales")
    if kind(FORMAT, "group") == 0:
        return row_scale, 0.0
    elif SCALES == "double":
        return row_scale * tl.load(scale_rows + 4 + group, mask=mask, other=0).to(tl.float32), 0.0
    elif SCALES == "super_min":
        record = scale_rows + group // 8 * 20
        both = load_as(record, mask, tl.uint32)
        pair = load_as(record + 4 + group % 8 * 2, mask, tl.uint16).to(tl.int32)
        d = half_bits(both) * (pair & 0xFF).to(tl.float32)
        return d, -(half_bits(both >> 16) * (pair >> 8).to(tl.float32))
    elif SCALES == "half_min" or SCALES == "half_zero":
        d = tl.load(scale_rows + 2 * group, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(scale_rows + 2 * group + 1, mask=mask, other=0.0).to(tl.float32)
        return d, second if SCALES == "half_min" else -(d * second)
    else:
        return tl.load(scale_rows + group, mask=mask, other=0.0).to(tl.float32), 0.0


@triton.jit
def q6_scales(scale_rows, block, mask):
    """(d fp32, sc of columns 0..15, sc of columns 16..31, int32) of q6_k blocks of 32 columns."""
    record = scale_rows + block // 8 * 18
    d = load_as(record, mask, tl.float16).to(tl.float32)
    pair = load_as(record + 2 + block % 8 * 2, mask, tl.uint16)
    first = (pair & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)
    second = (pair >> 8).to(tl.uint8).to(tl.int8, bitcast=True)
    return d, first.to(tl.int32), second.to(tl.int32)


@triton.jit
def packed_codes(ptr, mask, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Codes under 8 bits of COLUMNS columns from ptr [N]: two [N, COLUMNS / 2] of dtype.

    The first holds columns 0..15 of every 32, the second 16..31. dtype: int8, bf16 or fp32.
    """
    BITS: tl.constexpr = kind(FORMAT, "bits")
    OFFSET: tl.constexpr = kind(FORMAT, "offset")
    lane = tl.arange(0, COLUMNS // 2)
    pairs = tl.load(ptr[:, None] + lane[None, :], mask=mask[:, None], other=0)
    if kind(FORMAT, "codes") == "nf4":
        return decode_nf4_pairs(pairs, dtype)
    elif BITS == 4:
        return decode_pairs(pairs, OFFSET, dtype)
    elif BITS == 5:
        high = load_as(ptr + 16, mask, tl.uint32)[:, None] >> (lane % 4 * 8 + lane // 4)[None, :]
        first = (pairs & 0xF) | ((high & 1) << 4).to(tl.uint8)
        second = (pairs >> 4) | (high & 16).to(tl.uint8)
        return decode_bytes(first, OFFSET, dtype), decode_bytes(second, OFFSET, dtype)
    else:
        shift = (lane % 4 * 8 + lane // 4 * 2)[None, :]
        high = load_as(ptr + 16, mask, tl.uint32)[:, None] >> shift
        other = load_as(ptr + 20, mask, tl.uint32)[:, None] >> shift
        first = (pairs & 0xF) | ((high & 3) << 4).to(tl.uint8)
        second = (pairs >> 4) | ((other & 3) << 4).to(tl.uint8)
        return decode_bytes(first, OFFSET, dtype), decode_bytes(second, OFFSET, dtype)


@triton.jit
def byte_codes(ptr, mask, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Codes of a byte each at ptr, as dtype: int8, bf16, fp32 or, of e4m3, float8e4nv."""
    codes = tl.load(ptr, mask=mask, other=0)
    if dtype == tl.float8e4nv:
        return codes.to(tl.float8e4nv, bitcast=True)
    elif kind(FORMAT, "codes") == "e4m3":
        return decode_e4m3(codes, dtype)
    else:
        return cast(codes.to(tl.int8, bitcast=True), dtype)


@triton.jit
def block_values(data_rows, scale_rows, block, mask_n, mask_b, FORMAT: tl.constexpr):
    """fp32 values of rows [N] at blocks [B] of 32 columns: [N, B, 32]; masks [N] and [B].

    value = round(code * d), then + m rounded: launches set `enable_fp_fusion=False`.
    """
    BITS: tl.constexpr = kind(FORMAT, "bits")
    mask = mask_n[:, None] & mask_b[None, :]
    cols = tl.arange(0, 32)
    ptr = data_rows[:, None] + block.to(tl.int64)[None, :] * block_bytes(FORMAT)
    if BITS == 8:
        code = byte_codes(
            ptr[:, :, None] + cols[None, None, :], mask[:, :, None], FORMAT, tl.float32
        )
    else:
        ptrs = ptr[:, :, None] + (cols % 16)[None, None, :]
        pairs = tl.load(ptrs, mask=mask[:, :, None], other=0)
        u = (pairs >> (cols // 16 * 4).to(tl.uint8)[None, None, :]) & 0xF
        if BITS == 5:
            high = load_as(ptr + 16, mask, tl.uint32)[:, :, None]
            high = (high >> (cols % 4 * 8 + cols // 4)[None, None, :]) & 1
            u |= (high << 4).to(tl.uint8)
        if BITS == 6:
            low = load_as(ptr + 16, mask, tl.uint32)[:, :, None]
            high = load_as(ptr + 20, mask, tl.uint32)[:, :, None]
            high = tl.where((cols < 16)[None, None, :], low, high)
            u |= (((high >> (cols % 4 * 8 + cols // 4 % 4 * 2)[None, None, :]) & 3) << 4).to(
                tl.uint8
            )
        if kind(FORMAT, "codes") == "nf4":
            code = decode_nf4(u)
        else:
            code = u.to(tl.float32) - kind(FORMAT, "offset")
    if FORMAT == "q6_k":
        d, first, second = q6_scales(scale_rows[:, None], block[None, :], mask)
        low, high = d * first.to(tl.float32), d * second.to(tl.float32)
        scale = tl.where((cols < 16)[None, None, :], low[:, :, None], high[:, :, None])
        return code * scale
    else:
        row_scale = row_scales(scale_rows[:, None], mask_n[:, None], FORMAT)
        group = block[None, :] // group_blocks(FORMAT)
        d, m = group_scales(scale_rows[:, None], row_scale, group, mask, FORMAT)
        values = code * d[:, :, None]
        if has_minimum(FORMAT):
            values = values + m[:, :, None]
        return values


def check_rows(data: Tensor, format: str) -> int:
    """Blocks of 32 columns in a row. Raises ValueError for a format or layout not served here."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if data.dim() != 5 or data.shape[3] != 1:
        raise ValueError(
            f"data of shape {tuple(data.shape)} interleaves rows; pack it for the GPU (R = 1)"
        )
    return data.shape[1]


def dense_rows(data: Tensor, format: str) -> Tensor:
    """[N, K] view of a weight packed as "bf16" (K padded to even) or "f32"."""
    if data.shape[2] != 1:
        raise ValueError(
            f"data of shape {tuple(data.shape)} interleaves rows; pack it for the GPU (R = 1)"
        )
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    return data.view(dtype).reshape(data.shape[0], -1)
