"""Codes and scales of dense weights in every packed format: a group of columns in each lane.

The bits are those of `fastllm.ops.quantize`'s definition (see `quantize_fits`). Formats with fp16
scales find them and their codes in one kernel, K-quants in another; those with fp32 scales get the
largest magnitudes of rows and tiles from torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quant_activation import round_e4m3
from .quant_decode import NF4_TABLE
from .quant_format import FORMATS, block_bytes, kernel_format, kind
from .quantize_fits import (
    any_weight,
    clamp,
    extremes,
    fit_affine,
    fit_signed,
    fit_zero,
    half,
    inverse,
    value,
)
from .quantize_super import fit_super, fit_super_min
from .triton_compat import divide, recomputed, round_even

# As in `fastllm.ops.quantize_search`.
SIGNED_STARTS = {
    8: (-7.0, -7.5, -8.0, -8.5, -9.0, -9.5, -10.0, -10.5, 7.0, 7.5, 8.0, 9.0),
    16: (-15.0, -15.5, -16.0, -16.5, -17.0, -17.5, -18.0, -18.5, 15.0, 15.5, 16.0, 17.0),
    32: (-28.0, -29.0, -30.0, -31.0, -32.0, -33.0, 29.0, 30.0, 31.0),
    127: (-126.0, -126.5, -127.0, -127.5, 126.0, 126.5),
}
ZERO_STARTS = (14.0, 15.0, 16.0, 17.5)
AFFINE_STARTS = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
LANES = 64  # groups, or sub-blocks, of a program: one a thread


@triton.constexpr_function
def nf4_middle(i):
    """Between entries i and i + 1 of the table, exact."""
    return (NF4_TABLE[i] + NF4_TABLE[i + 1]) / 2


@triton.jit
def code(x, factor, low, middle, RULE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """int32 codes of values x: nearest of (x - low) factor + middle, as RULE rounds."""
    if RULE == "nf4":
        scaled = x * factor
        u = tl.zeros(x.shape, tl.int32)
        for i in tl.static_range(15):
            u += (scaled > nf4_middle(i)).to(tl.int32)
        return u
    elif RULE == "e4m3":
        return round_e4m3(clamp(x * factor, -448.0, 448.0))[0].to(tl.int32)
    elif RULE == "away":
        scaled = x * factor
        size = tl.abs(scaled)
        whole = tl.floor(size)
        whole += (size - whole >= 0.5).to(tl.float32)
        return tl.where(scaled < 0, -whole, whole).to(tl.int32)
    elif RULE == "down":
        return clamp((x - low) * factor + middle, LEAST, MOST).to(tl.int32)
    else:
        return clamp(round_even((x - low) * factor) + middle, LEAST, MOST).to(tl.int32)


@triton.jit
def store_block(
    to,
    x,
    mask,
    factors,
    low,
    middle,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Codes of the 32 columns at x into the words at `to`; factors: of both halves of them."""
    BITS: tl.constexpr = kind(FORMAT, "bits")
    first, second = factors
    if BITS == 8:
        for c in range(32):
            u = code(value(x, c, mask), first, low, middle, RULE, LEAST, MOST)
            tl.store(to + c, u.to(tl.uint8), mask=mask)
    else:
        for j in range(16):
            u = code(value(x, j, mask), first, low, middle, RULE, LEAST, MOST) & 15
            v = code(value(x, 16 + j, mask), second, low, middle, RULE, LEAST, MOST) & 15
            tl.store(to + j, (u | (v << 4)).to(tl.uint8), mask=mask)
    if BITS == 5:
        for j in range(4):
            byte = tl.zeros(x.shape, tl.int32)
            for i in range(8):
                u = code(value(x, 4 * i + j, mask), first, low, middle, RULE, LEAST, MOST)
                byte |= (u >> 4) << i
            tl.store(to + 16 + j, byte.to(tl.uint8), mask=mask)
    if BITS == 6:
        for j in range(8):
            factor = tl.where(j < 4, first, second)
            byte = tl.zeros(x.shape, tl.int32)
            for i in range(4):
                at = j // 4 * 16 + 4 * i + j % 4
                u = code(value(x, at, mask), factor, low, middle, RULE, LEAST, MOST)
                byte |= (u >> 4) << (2 * i)
            tl.store(to + 16 + j, byte.to(tl.uint8), mask=mask)


@triton.jit
def store_group(
    data_ptr,
    x,
    block,
    mask,
    factor,
    low,
    middle,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks from `block` on (counted over all rows), of columns from x on."""
    for b in range(BLOCKS):
        to = data_ptr + (block + b) * block_bytes(FORMAT)
        at, factors = x + 32 * b, (factor, factor)
        store_block(to, at, mask, factors, low, middle, FORMAT, RULE, LEAST, MOST)


@triton.jit
def program_groups(LANES: tl.constexpr):
    """int64 [LANES], computed at every call: kept during a search they take registers."""
    return tl.program_id(0).to(tl.int64) * LANES + recomputed(tl.arange(0, LANES))


@triton.jit
def quantize_groups_kernel(
    data_ptr,
    scales_ptr,
    w_ptr,
    importance_ptr,
    starts,
    stride_w,
    stride_i,
    groups,
    total,
    FORMAT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SEARCH: tl.constexpr,
    STARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    G: tl.constexpr = kind(FORMAT, "group")
    SCALES: tl.constexpr = kind(FORMAT, "scales")
    OFFSET: tl.constexpr = kind(FORMAT, "offset")
    BITS: tl.constexpr = kind(FORMAT, "bits")
    BLOCKS: tl.constexpr = G // 32
    group = program_groups(LANES)
    mask = group < total
    row, column = group // groups, group % groups * G
    x = w_ptr + row * stride_w + column
    w = importance_ptr + row * stride_i + column
    some = any_weight(w, mask, G, WEIGHTED)
    block = group * BLOCKS
    if SCALES == "half_min":
        LEVELS: tl.constexpr = (1 << BITS) - 1
        if SEARCH:
            d, m, _, _ = fit_affine(x, w, mask, some, starts, LEVELS, True, STARTS, G, WEIGHTED)
            d, m = half(d), half(m)
            factor, middle = inverse(d), 0.0
            store_group(
                data_ptr, x, block, mask, factor, m, middle, FORMAT, "even", 0, LEVELS, BLOCKS
            )
        else:
            m, high = extremes(x, mask, G)
            d = divide(high - m, tl.full(m.shape, LEVELS, tl.float32))
            factor, middle = inverse(d), 0.5
            store_group(
                data_ptr, x, block, mask, factor, m, middle, FORMAT, "down", 0, LEVELS, BLOCKS
            )
        tl.store(scales_ptr + 2 * group, d.to(tl.float16), mask=mask)
        tl.store(scales_ptr + 2 * group + 1, m.to(tl.float16), mask=mask)
    elif SCALES == "half_zero":
        d, z = fit_zero(x, w, mask, some, starts, 15, STARTS, G, WEIGHTED)
        factor = inverse(half(d))
        group = program_groups(LANES)
        store_group(
            data_ptr, x, group * BLOCKS, mask, factor, 0.0, z, FORMAT, "even", 0, 15, BLOCKS
        )
        tl.store(scales_ptr + 2 * group, d.to(tl.float16), mask=mask)
        tl.store(scales_ptr + 2 * group + 1, z.to(tl.float16), mask=mask)
    else:
        LOW: tl.constexpr = -OFFSET if OFFSET else -127
        HIGH: tl.constexpr = OFFSET - 1 if OFFSET else 127
        if SEARCH:
            d, _ = fit_signed(x, w, mask, some, starts, LOW, HIGH, STARTS, G, WEIGHTED)
            factor = inverse(half(d))
            least, most = LOW + OFFSET, HIGH + OFFSET
            store_group(
                data_ptr, x, block, mask, factor, 0.0, OFFSET, FORMAT, "even", least, most, BLOCKS
            )
        elif OFFSET:
            d = divide(first_peak(x, mask, G), tl.full(mask.shape, -OFFSET, tl.float32))
            store_group(
                data_ptr, x, block, mask, inverse(d), 0.0, OFFSET + 0.5, FORMAT, "down", 0,
                HIGH + OFFSET, BLOCKS,
            )  # fmt: skip
        else:
            low, high = extremes(x, mask, G)
            d = divide(tl.maximum(-low, high), tl.full(mask.shape, 127.0, tl.float32))
            store_group(
                data_ptr, x, block, mask, inverse(d), 0.0, 0.0, FORMAT, "away", 0, 0, BLOCKS
            )
        tl.store(scales_ptr + group, d.to(tl.float16), mask=mask)


@triton.jit
def first_peak(x, mask, COLUMNS: tl.constexpr):
    """The value of largest magnitude; the first of several."""
    peak = value(x, 0, mask)
    for c in range(1, COLUMNS):
        one = value(x, c, mask)
        peak = tl.where(tl.abs(one) > tl.abs(peak), one, peak)
    return peak


@triton.jit
def places_of_super(data_ptr, scales_ptr, FORMAT: tl.constexpr, SUPERS: tl.constexpr):
    """Where they go: codes of blocks [SUPERS, 8], scales [SUPERS, 1], the same as halves.

    Computed after the search, whose registers they would take.
    """
    RECORD: tl.constexpr = 18 if FORMAT == "q6_k" else 20
    index = recomputed(tl.program_id(0) * SUPERS + tl.arange(0, SUPERS))[:, None].to(tl.int64)
    to = data_ptr + (index * 8 + tl.arange(0, 8)[None, :]) * block_bytes(FORMAT)
    record = scales_ptr + index * RECORD
    return to, record, record.to(tl.pointer_type(tl.float16), bitcast=True)


@triton.jit
def quantize_super_kernel(
    data_ptr,
    scales_ptr,
    w_ptr,
    importance_ptr,
    starts,
    stride_w,
    stride_i,
    supers,
    total,
    FORMAT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STARTS: tl.constexpr,
    SUPERS: tl.constexpr,
):
    SUBS: tl.constexpr = 16 if FORMAT == "q6_k" else 8
    LEVELS: tl.constexpr = (1 << kind(FORMAT, "bits")) - 1
    # int32: 2^31 super-blocks are 2^39 values
    index = (tl.program_id(0) * SUPERS + tl.arange(0, SUPERS))[:, None]
    sub = tl.arange(0, SUBS)[None, :]
    live = index < total
    mask = live & (sub < SUBS)
    row, column = (index // supers).to(tl.int64), index % supers * 256
    x = w_ptr + row * stride_w + column + sub * (256 // SUBS)
    w = importance_ptr + row * stride_i + column + sub * (256 // SUBS)
    block = tl.arange(0, 8)[None, :]
    of_block = w_ptr + row * stride_w + column + block * 32
    if FORMAT == "q6_k":
        d, sc = fit_super(x, w, mask, starts, STARTS, WEIGHTED)
        to, record, halves = places_of_super(data_ptr, scales_ptr, FORMAT, SUPERS)
        tl.store(record + 2 + sub, sc.to(tl.int32).to(tl.uint8), mask=mask)
        first, second = tl.split(tl.reshape(inverse(d * sc), (SUPERS, 8, 2)))
        factors = (first, second)
        inside = live & (block < 8)
        store_block(to, of_block, inside, factors, 0.0, 32.0, FORMAT, "even", 0, 63)
    else:
        d, dmin, sc, mn = fit_super_min(x, w, mask, starts, LEVELS, STARTS, WEIGHTED)
        to, record, halves = places_of_super(data_ptr, scales_ptr, FORMAT, SUPERS)
        tl.store(halves + 1, dmin.to(tl.float16), mask=live)
        tl.store(record + 4 + 2 * sub, sc.to(tl.int32).to(tl.uint8), mask=mask)
        tl.store(record + 5 + 2 * sub, mn.to(tl.int32).to(tl.uint8), mask=mask)
        factor = inverse(d * sc)
        factors = (factor, factor)
        low = -(dmin * mn)
        store_block(to, of_block, mask, factors, low, 0.0, FORMAT, "even", 0, LEVELS)
    tl.store(halves, d.to(tl.float16), mask=live)


@triton.jit
def short_scale(d):
    """d rounded to 16 significant bits, to nearest even."""
    bits = d.to(tl.int32, bitcast=True)
    return ((bits + 0x7F + ((bits >> 8) & 1)) & -256).to(tl.float32, bitcast=True)


@triton.jit
def scales_kernel(d_ptr, peaks_ptr, count, TOP: tl.constexpr, LANES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    peak = tl.load(peaks_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    d = short_scale(divide(peak, tl.full(peak.shape, TOP, tl.float32)))
    tl.store(d_ptr + at, d, mask=at < count)


@triton.jit
def quantize_floats_kernel(
    data_ptr,
    scales_ptr,
    w_ptr,
    d_ptr,
    stride_w,
    groups,
    tiles,
    stride_scales,
    total,
    FORMAT: tl.constexpr,
    LANES: tl.constexpr,
):
    """nf4 formats: 64 columns a lane; bytes: 32, and d [rows] or [tiles of 128 rows, tiles]."""
    NF4: tl.constexpr = kind(FORMAT, "codes") == "nf4"
    G: tl.constexpr = 64 if NF4 else 32
    RULE: tl.constexpr = "even" if kind(FORMAT, "codes") == "int8" else kind(FORMAT, "codes")
    group = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = group < total
    row, of_row = group // groups, group % groups
    x = w_ptr + row * stride_w + of_row * G
    if NF4:
        low, high = extremes(x, mask, G)
        d = tl.maximum(-low, high)
        if kind(FORMAT, "scales") == "double":
            scale = tl.load(d_ptr + row, mask=mask, other=0.0)
            steps = clamp(round_even(d * inverse(scale)), 0.0, 255.0)
            steps = tl.where(d > 0, tl.maximum(steps, 1.0), steps)
            to = scales_ptr + row * stride_scales + 4 + of_row
            tl.store(to, steps.to(tl.int32).to(tl.uint8), mask=mask)
            d = scale * steps
        else:
            tl.store(scales_ptr + group, d, mask=mask)
    elif kind(FORMAT, "group") == 0:
        d = tl.load(d_ptr + row, mask=mask, other=0.0)
    else:
        d = tl.load(d_ptr + row // 128 * tiles + of_row // 4, mask=mask, other=0.0)
    factor = inverse(d)
    BLOCKS: tl.constexpr = G // 32
    store_group(
        data_ptr, x, group * BLOCKS, mask, factor, 0.0, 0.0, FORMAT, RULE, -127, 127, BLOCKS
    )


def quantize(
    w: Tensor, format: str, importance: Tensor | None, data: Tensor, scales: Tensor
) -> None:
    """Writes data and scales (one row a group) of w[n, K]: f32, bf16 or f16, any row stride.

    importance: f32 [K] or [n, K], or None.
    """
    if w.numel() == 0:
        scales.zero_()
        return
    if FORMATS[format].scales in ("float", "double"):
        _floats(w, format, data, scales)
    else:
        _searched(w, format, importance, data, scales)


def _starts(format: str) -> tuple[float, ...]:
    found = FORMATS[format]
    if found.scales == "half_zero":
        return ZERO_STARTS
    if found.scales in ("half_min", "super_min"):
        return AFFINE_STARTS
    return SIGNED_STARTS[found.offset or 127]


def _searched(
    w: Tensor, format: str, importance: Tensor | None, data: Tensor, scales: Tensor
) -> None:
    n, k = w.shape
    starts = _starts(format)
    table = torch.tensor(starts, dtype=torch.float32, device=w.device)
    weighted = importance is not None
    of_rows = importance is not None and importance.dim() == 2
    strides = w.stride(0), importance.stride(0) if importance is not None and of_rows else 0
    weights = table if importance is None else importance
    if FORMATS[format].scales in ("super_min", "super"):
        total, supers = n * (k // 256), LANES // (16 if format == "q6_k" else 8)
        quantize_super_kernel[(triton.cdiv(total, supers),)](
            data, scales, w, weights, table, *strides, k // 256, total,
            FORMAT=kernel_format(format), WEIGHTED=weighted, STARTS=len(starts), SUPERS=supers,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
        return
    groups = k // FORMATS[format].group
    quantize_groups_kernel[(triton.cdiv(n * groups, LANES),)](
        data, scales, w, weights, table, *strides, groups, n * groups,
        FORMAT=kernel_format(format), WEIGHTED=weighted,
        SEARCH=weighted or format.startswith("int4"),
        STARTS=len(starts), LANES=LANES, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip


def _floats(w: Tensor, format: str, data: Tensor, scales: Tensor) -> None:
    (n, k), found = w.shape, FORMATS[format]
    tiles = -(-k // 128)
    if format == "fp8_block":
        padded = torch.nn.functional.pad(w.abs(), (0, -k % 128, 0, -n % 128))
        peaks = padded.unflatten(0, (-1, 128)).unflatten(2, (tiles, 128)).amax((1, 3))
    else:
        peaks = w.abs().amax(1)
    d = torch.empty(peaks.shape, dtype=torch.float32, device=w.device)
    top = {"int8": 127.0, "e4m3": 448.0, "nf4": 255.0}[found.codes]
    scales_kernel[(triton.cdiv(d.numel(), LANES),)](
        d, peaks, d.numel(), TOP=top, LANES=LANES, num_warps=2
    )
    if format == "fp8_block":
        scales.copy_(d.repeat_interleave(128, 0)[:n].view(scales.shape))
    elif found.group == 0:
        scales.copy_(d.view(scales.shape))
    elif found.scales == "double":
        scales.zero_()
        scales[:, :4] = d.view(torch.uint8).view(n, 4)
    groups = k // (64 if found.codes == "nf4" else 32)
    quantize_floats_kernel[(triton.cdiv(n * groups, LANES),)](
        data, scales, w, d, w.stride(0), groups, tiles, scales.stride(0), n * groups,
        FORMAT=kernel_format(format), LANES=LANES, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
