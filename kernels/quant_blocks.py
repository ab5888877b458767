"""A unit of columns of a product with packed weights: the arithmetic of `quant_matmul`.

A unit is 32 columns in mode int8, else those of one scale, at most 128 (`unit_columns`). Exact
int32 dot of codes, or fp32 dot of x with the unscaled code; then one FMA with the scale and, in
formats that have one, one with the minimum. Every kernel with packed weights adds units by these
functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quant_format import (
    block_bytes,
    byte_codes,
    group_blocks,
    group_scales,
    has_minimum,
    kind,
    packed_codes,
    q6_scales,
    row_scales,
    unit_columns,
)
from .triton_compat import dot, fma


@triton.constexpr_function
def operand_type(mode):
    """Type of both operands of a product: packed codes become it (fp8's are bytes, and stay)."""
    return {"int8": tl.int8, "bf16": tl.bfloat16, "fp32": tl.float32}[mode]


@triton.jit
def activation_unit(
    x_rows,
    scales_ptr,
    sums_ptr,
    place,
    mask,
    left,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    SHORT: tl.constexpr,
):
    """What a unit of each row of x gives to products: (values, more values, dx, sum).

    x_rows [M]: where the row's unit begins. Values [columns, M]; of x itself beside codes under 8
    bits columns 0..15 of every 32, and 16..31 in `more`. In mode fp32 they are x_rows and mask
    instead, for `unit_dot_fp32` to load. place [M]: of dx and sums. left: columns to the row's
    end, looked at if SHORT: the last unit may reach beyond it.
    """
    UNIT: tl.constexpr = unit_columns(FORMAT, MODE)
    x_sum, x_scale = 0.0, 1.0
    if has_minimum(FORMAT):
        x_sum = tl.load(sums_ptr + place, mask=mask, other=0.0)[None, :]
    if MODE == "int8" or MODE == "fp8":
        x_scale = tl.load(scales_ptr + place, mask=mask, other=0.0)[None, :]
    if MODE == "fp32":
        return x_rows, mask, x_scale, x_sum
    elif MODE == "int8" or kind(FORMAT, "bits") == 8:
        cols = tl.arange(0, UNIT)[:, None]
        inside = mask[None, :] & (cols < left) if SHORT else mask[None, :]
        values = tl.load(x_rows[None, :] + cols, mask=inside, other=0.0)
        return values, values, x_scale, x_sum
    else:
        lane = tl.arange(0, UNIT // 2)
        half = x_rows[None, :] + (lane // 16 * 32 + lane % 16)[:, None]
        values = tl.load(half, mask=mask[None, :], other=0.0)
        return values, tl.load(half + 16, mask=mask[None, :], other=0.0), x_scale, x_sum


@triton.jit
def unit_dot_fp32(
    t,
    x_rows,
    mask_m,
    ptr,
    mask,
    left,
    FORMAT: tl.constexpr,
    UNIT: tl.constexpr,
    SHORT: tl.constexpr,
):
    """t [N, M] plus codes at ptr times x, 32 columns at a time: operands pass through registers."""
    lane = tl.arange(0, 16)[:, None]
    for i in tl.static_range(UNIT // 32):
        x = x_rows[None, :] + i * 32
        at = ptr + i * block_bytes(FORMAT)
        inside = mask_m[None, :]
        if kind(FORMAT, "bits") == 8:
            cols = tl.arange(0, 32)
            within = mask[:, None]
            if SHORT:
                inside = inside & (cols[:, None] < left - i * 32)
                within = within & (cols[None, :] < left - i * 32)
            values = tl.load(x + cols[:, None], mask=inside, other=0.0)
            t = dot(byte_codes(at[:, None] + cols[None, :], within, FORMAT, tl.float32), values, t)
        else:
            first, second = packed_codes(at, mask, FORMAT, 32, tl.float32)
            t = dot(first, tl.load(x + lane, mask=inside, other=0.0), t)
            t = dot(second, tl.load(x + 16 + lane, mask=inside, other=0.0), t)
    return t


@triton.jit
def add_unit(
    acc,
    x,
    data_rows,
    scale_rows,
    row_scale,
    unit,
    mask,
    left,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    SHORT: tl.constexpr,
):
    """acc [N, M] plus the product of one unit of the weight's rows with x, an `activation_unit`.

    data_rows, scale_rows, row_scale: of whole rows [N] (`weight_rows`, `row_scales`).
    """
    UNIT: tl.constexpr = unit_columns(FORMAT, MODE)
    BLOCKS: tl.constexpr = UNIT // 32
    values, more, x_scale, x_sum = x
    ptr = data_rows + unit * (BLOCKS * block_bytes(FORMAT))
    if FORMAT == "q6_k":
        return add_q6_unit(acc, x, ptr, scale_rows, unit, mask, MODE)
    else:
        SUMS: tl.constexpr = tl.int32 if MODE == "int8" else tl.float32
        t = tl.zeros(acc.shape, dtype=SUMS)
        if MODE == "fp32":
            t = unit_dot_fp32(t, values, more, ptr, mask, left, FORMAT, UNIT, SHORT)
        elif kind(FORMAT, "bits") == 8:
            cols = tl.arange(0, UNIT)[None, :]
            inside = mask[:, None] & (cols < left) if SHORT else mask[:, None]
            t = dot(byte_codes(ptr[:, None] + cols, inside, FORMAT, values.dtype), values, t)
        else:
            first, second = packed_codes(ptr, mask, FORMAT, UNIT, operand_type(MODE))
            if MODE == "int8":
                t = dot(tl.interleave(first, second), values, t)
            else:
                t = dot(second, more, dot(first, values, t))
        group = unit * BLOCKS // group_blocks(FORMAT)
        d, m = group_scales(scale_rows, row_scale, group, mask, FORMAT)
        if MODE == "int8" and kind(FORMAT, "codes") == "nf4":
            d = d * 0.007874015748031496  # 1 / 127
        acc = fma(t.to(tl.float32), tl.broadcast_to(d[:, None] * x_scale, acc.shape), acc)
        if has_minimum(FORMAT):
            m = tl.broadcast_to(m[:, None], acc.shape)
            acc = fma(m, tl.broadcast_to(x_sum, acc.shape), acc)
        return acc


@triton.jit
def add_q6_unit(acc, x, ptr, scale_rows, block, mask, MODE: tl.constexpr):
    """`add_unit` of q6_k: 32 columns whose halves have scales of their own."""
    values, more, x_scale, _ = x
    d, first_scale, second_scale = q6_scales(scale_rows, block, mask)
    first, second = packed_codes(ptr, mask, "q6_k", 32, operand_type(MODE))
    if MODE == "int8":  # an instruction adds 32 columns: zeros keep the halves apart
        none = tl.zeros_like(first)
        zeros = tl.zeros(acc.shape, dtype=tl.int32)
        s = dot(tl.interleave(first, none), values, zeros) * first_scale[:, None]
        s += dot(tl.interleave(none, second), values, zeros) * second_scale[:, None]
        return fma(s.to(tl.float32), tl.broadcast_to(d[:, None] * x_scale, acc.shape), acc)
    else:
        zeros = tl.zeros(acc.shape, dtype=tl.float32)
        if MODE == "fp32":
            at = values[None, :] + tl.arange(0, 16)[:, None]
            values = tl.load(at, mask=more[None, :], other=0.0)
            more = tl.load(at + 16, mask=more[None, :], other=0.0)
        scale = (d * first_scale.to(tl.float32))[:, None]
        acc = fma(dot(first, values, zeros), tl.broadcast_to(scale, acc.shape), acc)
        scale = (d * second_scale.to(tl.float32))[:, None]
        return fma(dot(second, more, zeros), tl.broadcast_to(scale, acc.shape), acc)


@triton.jit
def add_units(
    acc,
    x_rows,
    x_scales_ptr,
    sums_ptr,
    places,
    data_rows,
    scale_rows,
    mask_n,
    mask_m,
    K,
    begin,
    end,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    SHORT: tl.constexpr,
    UNITS: tl.constexpr,
):
    """acc [N, M] plus units begin to end of the weight's rows times rows of x, UNITS a step.

    x_rows, places: of the rows' first units.
    """
    UNIT: tl.constexpr = unit_columns(FORMAT, MODE)
    row_scale = row_scales(scale_rows, mask_n, FORMAT)
    for first in range(begin, end, UNITS):
        for i in tl.static_range(UNITS):
            unit = first + i
            live_n, live_m, left = mask_n, mask_m, K - unit * UNIT
            if UNITS > 1:
                live_n, live_m = mask_n & (unit < end), mask_m & (unit < end)
            x = activation_unit(
                x_rows + unit * UNIT, x_scales_ptr, sums_ptr, places + unit, live_m, left,
                FORMAT, MODE, SHORT,
            )  # fmt: skip
            acc = add_unit(
                acc, x, data_rows, scale_rows, row_scale, unit, live_n, left, FORMAT, MODE, SHORT
            )
    return acc


@triton.jit
def gate_up_units(
    gate,
    up,
    x_rows,
    x_scales_ptr,
    sums_ptr,
    places,
    gate_data,
    gate_scales,
    up_data,
    up_scales,
    mask_n,
    mask_m,
    K,
    end,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    SHORT: tl.constexpr,
    UNITS: tl.constexpr,
):
    """`add_units` of two weights, a unit of x serving both.

    In mode fp32, whose operands pass through registers, one after the other: together they spill.
    """
    UNIT: tl.constexpr = unit_columns(FORMAT, MODE)
    if MODE == "fp32":
        gate = add_units(
            gate, x_rows, x_scales_ptr, sums_ptr, places, gate_data, gate_scales,
            mask_n, mask_m, K, 0, end, FORMAT, MODE, SHORT, UNITS,
        )  # fmt: skip
        up = add_units(
            up, x_rows, x_scales_ptr, sums_ptr, places, up_data, up_scales,
            mask_n, mask_m, K, 0, end, FORMAT, MODE, SHORT, UNITS,
        )  # fmt: skip
    else:
        gate_scale = row_scales(gate_scales, mask_n, FORMAT)
        up_scale = row_scales(up_scales, mask_n, FORMAT)
        for first in range(0, end, UNITS):
            for i in tl.static_range(UNITS):
                unit = first + i
                live_n, live_m, left = mask_n, mask_m, K - unit * UNIT
                if UNITS > 1:
                    live_n, live_m = mask_n & (unit < end), mask_m & (unit < end)
                x = activation_unit(
                    x_rows + unit * UNIT, x_scales_ptr, sums_ptr, places + unit, live_m, left,
                    FORMAT, MODE, SHORT,
                )  # fmt: skip
                gate = add_unit(
                    gate, x, gate_data, gate_scales, gate_scale, unit, live_n, left,
                    FORMAT, MODE, SHORT,
                )  # fmt: skip
                up = add_unit(
                    up, x, up_data, up_scales, up_scale, unit, live_n, left, FORMAT, MODE, SHORT
                )
    return gate, up
