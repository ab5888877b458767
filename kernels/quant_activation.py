"""Activations as products with packed weights read them: int8, e4m3, or sums of x for minima.

int8: 32 columns, dx = amax / 127, q = round(x * (127 / amax)) to even. e4m3: 128 columns, dx =
amax / 448, q = e4m3(x * (448 / amax)). Zeros, and values too small to divide by, give 0; NaN or
infinity makes dx NaN or infinite.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .quant_format import FORMATS, has_minimum, unit_columns
from .triton_compat import cast, divide, round_even


@triton.jit
def block_scale(x, top: tl.constexpr):
    """(dx, its inverse) [B] of blocks x [B, C] whose largest value becomes top."""
    amax = tl.max(tl.abs(x), axis=1)
    bad = tl.max((x != x).to(tl.int32), axis=1) > 0  # tl.max passes over NaN
    amax = tl.where(bad, float("nan"), amax)
    whole = tl.full(amax.shape, top, tl.float32)
    inverse = divide(whole, tl.where(amax > 0, amax, top))
    return divide(amax, whole), tl.where(inverse == float("inf"), 0.0, inverse)


@triton.jit
def quantize_activation_kernel(
    q_ptr,
    scales_ptr,
    sums_ptr,
    x_ptr,
    stride_xm,
    n_blocks,
    PAIRED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    live = blocks < n_blocks
    slot = tl.arange(0, 32)
    if PAIRED:  # slot 2j holds column j and slot 2j + 1 column 16 + j: the order of packed codes
        cols = (slot % 2) * 16 + slot // 2
    else:
        cols = slot
    offsets = blocks[:, None] * 32 + cols[None, :]
    x = tl.load(x_ptr + row * stride_xm + offsets, mask=live[:, None], other=0.0).to(tl.float32)
    scale, inverse = block_scale(x, 127.0)
    q = round_even(x * inverse[:, None]).to(tl.int32)
    out = row * n_blocks + blocks
    tl.store(q_ptr + out[:, None] * 32 + slot[None, :], q.to(tl.int8), mask=live[:, None])
    tl.store(scales_ptr + out, scale, mask=live)
    tl.store(sums_ptr + out, scale * tl.sum(q, axis=1).to(tl.float32), mask=live)


@triton.jit
def sum_activation_kernel(
    sums_ptr, x_ptr, stride_xm, n_units, UNIT: tl.constexpr, UNITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    live = units < n_units
    offsets = units[:, None] * UNIT + tl.arange(0, 32)[None, :]
    total = tl.zeros((UNITS,), dtype=tl.float32)
    for b in tl.static_range(UNIT // 32):
        at = x_ptr + row * stride_xm + offsets + b * 32
        total += tl.sum(tl.load(at, mask=live[:, None], other=0.0).to(tl.float32), axis=1)
    tl.store(sums_ptr + row * n_units + units, total, mask=live)


@triton.jit
def round_e4m3(x):
    """(e4m3 bits, value) of fp32 x, |x| at most 448, rounded to nearest even.

    Above 2^-6 three fraction bits remain; below, multiples of 2^-9.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign, size = bits & 0x80000000, bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1)) & 0xFFF00000
    steps = round_even(tl.abs(x) * 512.0)
    small = size < 0x3C800000  # 2^-6
    code = tl.where(small, steps.to(tl.int32), (normal.to(tl.int32) >> 20) - 960)
    value = tl.where(small, steps * 0.001953125, normal.to(tl.float32, bitcast=True))
    signed = (value.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return (code | (sign >> 24).to(tl.int32)).to(tl.uint8), signed


@triton.jit
def quantize_e4m3_kernel(
    q_ptr, scales_ptr, x_ptr, stride_xm, K, n_units, BITS: tl.constexpr, UNITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    cols = units[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + row * stride_xm + cols, mask=cols < K, other=0.0).to(tl.float32)
    scale, inverse = block_scale(x, 448.0)
    bits, value = round_e4m3(x * inverse[:, None])
    if BITS:
        tl.store(q_ptr + row * K + cols, bits, mask=cols < K)
    else:
        tl.store(q_ptr + row * K + cols, cast(value, q_ptr.dtype.element_ty), mask=cols < K)
    tl.store(scales_ptr + row * n_units + units, scale, mask=units < n_units)


def quantize_activation(x: Tensor, paired: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 [M, K], dx f32 [M, K/32], dx * sum(q) f32 [M, K/32]) of x[M, K].

    `paired` interleaves each block's halves, as packed codes are read.
    """
    m, k = x.shape
    n_blocks = k // 32
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales, sums = (x.new_empty((m, n_blocks), dtype=torch.float32) for _ in range(2))
    blocks = min(triton.next_power_of_2(max(n_blocks, 1)), tuning.ELEMENTWISE_BLOCK // 32)
    quantize_activation_kernel[(m, triton.cdiv(n_blocks, blocks))](
        q,
        scales,
        sums,
        x,
        x.stride(0),
        n_blocks,
        PAIRED=paired,
        BLOCKS=blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return q, scales, sums


def sum_activation(x: Tensor, columns: int) -> Tensor:
    """Sums f32 [M, K / columns] of x[M, K], the sums of 32 columns added in ascending order."""
    m, k = x.shape
    n_units = k // columns
    sums = x.new_empty((m, n_units), dtype=torch.float32)
    units = min(triton.next_power_of_2(max(n_units, 1)), tuning.ELEMENTWISE_BLOCK // 32)
    sum_activation_kernel[(m, triton.cdiv(n_units, units))](
        sums, x, x.stride(0), n_units, UNIT=columns, UNITS=units, num_warps=4
    )
    return sums


def quantize_e4m3(x: Tensor, native: bool | None = None) -> tuple[Tensor, Tensor]:
    """(q [M, K], dx f32 [M, ceil(K/128)]) of x[M, K].

    q is float8_e4m3fn if `native`, by default where the device multiplies it; else bf16, which
    holds its values exactly.
    """
    m, k = x.shape
    n_units = triton.cdiv(k, 128)
    if native is None:
        native = tuning.multiplies_e4m3(x.device)
    q = x.new_empty((m, k), dtype=torch.float8_e4m3fn if native else torch.bfloat16)
    scales = x.new_empty((m, n_units), dtype=torch.float32)
    units = min(triton.next_power_of_2(max(n_units, 1)), tuning.ELEMENTWISE_BLOCK // 128)
    quantize_e4m3_kernel[(m, triton.cdiv(n_units, units))](
        q.view(torch.uint8) if native else q,
        scales,
        x,
        x.stride(0),
        k,
        n_units,
        BITS=native,
        UNITS=units,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return q, scales


def prepared(x: Tensor, format: str, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values, dx, sums) of x[M, K] as `quant_blocks.activation_unit` reads them."""
    if mode == "int8":
        return quantize_activation(x, paired=FORMATS[format].bits < 8)
    if mode == "fp8":
        q, scales = quantize_e4m3(x)
        return q, scales, scales
    if has_minimum(format):
        sums = sum_activation(x, int(unit_columns(format, mode)))
        return x, sums, sums
    empty = x.new_empty(0, dtype=torch.float32)
    return x, empty, empty
