"""y = x @ W.T + bias for weights that stay packed.

One product per unit of columns (`quant_blocks`), its scale applied once, units in ascending K, one
fp32 accumulator:
    int8:       s = exact int32 sum of code * q over 32 columns;     acc = fma(s, d * dx, acc)
    fp8:        t = fp32 dot of e4m3 x with e4m3 codes, 128 columns; acc = fma(t, d * dx, acc)
    bf16, fp32: t = fp32 dot of x with the unscaled code;            acc = fma(t, d, acc)
    minimum:    x_sum = sum of the unit's x (dx * q);                acc = fma(m, x_sum, acc)
Codes are exact in int8 and bf16, so a dequantized weight is never rounded. Orientation and
independence of the number of rows are those of `linear`: weights are the long side of the tile.
The epilogue can add the product to an fp32 residual, or activate the halves of a gated weight,
with the roundings of the separate ops.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .linear import columns_contiguous, linear, tile_of_program
from .moe_activation import ACTIVATIONS, activate
from .quant_activation import prepared
from .quant_blocks import add_units, gate_up_units
from .quant_format import (
    check_rows,
    dense_rows,
    kernel_format,
    modes,
    unit_columns,
    weight_rows,
)
from .triton_compat import cast


@triton.jit
def finished(acc, up, residual, ROUND: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr):
    """fp32 outputs of fp32 sums, biases included: activated, or added to the residual."""
    if GATED != "":
        if ROUND:
            acc = cast(acc, tl.bfloat16).to(tl.float32)
            up = cast(up, tl.bfloat16).to(tl.float32)
        return activate(acc, up, GATED)
    elif RESIDUAL:
        return residual + (cast(acc, tl.bfloat16).to(tl.float32) if ROUND else acc)
    else:
        return acc


@triton.jit
def quant_matmul_kernel(
    y_ptr,
    x_ptr,
    x_scales_ptr,
    sums_ptr,
    data_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    stride_xm,
    M,
    N,
    K,
    units_per_split,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    SHORT: tl.constexpr,
    ROUND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    UNIT: tl.constexpr = unit_columns(FORMAT, MODE)
    tile_n, tile_m = tile_of_program(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP
    )
    split = tl.program_id(1)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_units = tl.cdiv(K, UNIT)
    data_rows, scale_rows = weight_rows(data_ptr, scales_ptr, rows_n, K // 32, FORMAT)
    x_rows = x_ptr + rows_m.to(tl.int64) * stride_xm
    places = rows_m.to(tl.int64) * n_units
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up = acc
    if GATED == "":
        begin = split * units_per_split
        end = tl.minimum(n_units, begin + units_per_split)
        acc = add_units(
            acc, x_rows, x_scales_ptr, sums_ptr, places, data_rows, scale_rows,
            rows_n < N, rows_m < M, K, begin, end, FORMAT, MODE, SHORT, UNITS,
        )  # fmt: skip
    else:
        up_data, up_scales = weight_rows(data_ptr, scales_ptr, N + rows_n, K // 32, FORMAT)
        acc, up = gate_up_units(
            acc, up, x_rows, x_scales_ptr, sums_ptr, places, data_rows, scale_rows, up_data,
            up_scales, rows_n < N, rows_m < M, K, n_units, FORMAT, MODE, SHORT, UNITS,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n, mask=rows_n < N, other=0.0).to(tl.float32)[:, None]
        if GATED != "":
            bias = tl.load(bias_ptr + N + rows_n, mask=rows_n < N, other=0.0)
            up += bias.to(tl.float32)[:, None]
    mask = (rows_m < M)[:, None] & (rows_n < N)[None, :]
    out = (split.to(tl.int64) * M + rows_m)[:, None] * N + rows_n[None, :]
    residual = 0.0
    if RESIDUAL:
        residual = tl.trans(tl.load(residual_ptr + out, mask=mask, other=0.0))
    y = finished(acc, up, residual, ROUND, RESIDUAL, GATED)
    tl.store(y_ptr + out, tl.trans(cast(y, y_ptr.dtype.element_ty)), mask=mask)


@triton.jit
def finish_kernel(
    y_ptr,
    partial_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    N_SPLITS: tl.constexpr,
    ROUND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    WIDTH: tl.constexpr = 2 if GATED != "" else 1
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    up = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(N_SPLITS):
        at = partial_ptr + (split * M + row) * N * WIDTH + cols
        acc += tl.load(at, mask=mask, other=0.0)
        if GATED != "":
            up += tl.load(at + N, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if GATED != "":
            up += tl.load(bias_ptr + N + cols, mask=mask, other=0.0).to(tl.float32)
    residual = 0.0
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * N + cols, mask=mask, other=0.0)
    y = finished(acc, up, residual, ROUND, RESIDUAL, GATED)
    tl.store(y_ptr + row * N + cols, cast(y, y_ptr.dtype.element_ty), mask=mask)


def finish(
    y: Tensor,
    partial: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: str,
    dtype: torch.dtype,
) -> None:
    """y[M, n] = the epilogue of the sum over splits, in order, of partial f32 [splits, M, N].

    N is n, or 2 n if gated; rounded to `dtype` where separate ops would be.
    """
    (m, n), n_splits = y.shape, partial.shape[0]
    block = min(triton.next_power_of_2(n), tuning.ELEMENTWISE_BLOCK)
    finish_kernel[(m, triton.cdiv(n, block))](
        y,
        partial,
        partial if bias is None else bias,
        partial if residual is None else residual,
        m,
        n,
        N_SPLITS=n_splits,
        ROUND=dtype == torch.bfloat16,
        HAS_BIAS=bias is not None,
        RESIDUAL=residual is not None,
        GATED=gated,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )


def quant_matmul(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None = None,
    activation: str = "bf16",
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    gated: str = "",
    *,
    batch_invariant: bool = True,
) -> Tensor:
    """y[..., n] = x @ W.T + bias in `out_dtype` (default: x's), contiguous.

    x[..., K]: f32 or bf16; data, scales: W packed as `format` (one of `quant_format.FORMATS`,
    "bf16" or "f32"); activation: "int8", "fp8", "bf16" (x bf16) or "fp32" (x f32), ignored by the
    dense formats. With residual f32 [..., n], y = residual + round(x @ W.T + bias), f32; with
    gated ("silu", "gelu_tanh", ...), y[..., n / 2] = act(round(gate)) * round(up) of a weight
    whose rows are gate's, then up's; both round to x's dtype. Raises ValueError for a format,
    layout or mode not served.
    """
    if gated and (gated not in ACTIVATIONS or n % 2 or residual is not None):
        raise ValueError(
            f"gated {gated!r} of {n} rows: one of {', '.join(ACTIVATIONS)}, rows of gate and as "
            "many of up, no residual"
        )
    width = n // 2 if gated else n
    dtype = torch.float32 if residual is not None else out_dtype or x.dtype
    y = torch.empty((*x.shape[:-1], width), dtype=dtype, device=x.device)
    x2 = columns_contiguous(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    bias = bias if bias is None else bias.contiguous()
    y2 = y.view(x2.shape[0], width)
    rest = None if residual is None else residual.reshape(y2.shape).contiguous()
    if format in ("bf16", "f32"):
        weight = dense_rows(data, format)[:n, : x.shape[-1]]
        if not gated and residual is None:
            return linear(x, weight, bias, out_dtype, batch_invariant=batch_invariant)
        sums = linear(x2, weight, bias, torch.float32, batch_invariant=batch_invariant)
        if y.numel():
            finish(y2, sums[None], None, rest, gated, x.dtype)
        return y
    check_rows(data, format)
    if activation not in modes(format):
        raise ValueError(f"activation {activation!r} of {format} is none of {modes(format)}")
    if y.numel():
        options = (format, activation, bias, rest, gated, batch_invariant)
        _launch(y2, x2, data, scales, *options)
    return y


def _launch(
    y: Tensor,
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    mode: str,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: str,
    batch_invariant: bool,
) -> None:
    """`quant_matmul` of rows x[M, K] of at least one output, arguments checked."""
    (m, k), width = x.shape, y.shape[1]
    unit = int(unit_columns(format, mode))
    tile = tuning.quant_tile(m, format, mode, bool(gated), x.device)
    n_tiles = triton.cdiv(width, tile.n) * triton.cdiv(m, tile.m)
    n_splits = 1 if batch_invariant else tuning.k_splits(n_tiles, m, k, tile.k)
    whole = n_splits == 1
    # Splits of a gated weight are plain products of all its rows, activated when they are summed.
    n = width if whole or not gated else 2 * width
    out = y if whole else y.new_empty((n_splits, m, n), dtype=torch.float32)
    values, x_scales, sums = prepared(x, format, mode)
    quant_matmul_kernel[(triton.cdiv(n, tile.n) * triton.cdiv(m, tile.m), n_splits)](
        out,
        values,
        x_scales,
        sums,
        data,
        scales,
        scales if bias is None else bias,
        scales if residual is None else residual,
        values.stride(0),
        m,
        n,
        k,
        triton.cdiv(triton.cdiv(k, unit), n_splits),
        FORMAT=kernel_format(format),
        MODE=mode,
        SHORT=k % unit != 0,
        ROUND=x.dtype == torch.bfloat16,
        HAS_BIAS=bias is not None and whole,
        RESIDUAL=residual is not None and whole,
        GATED=gated if whole else "",
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        UNITS=max(1, tile.k // unit),
        GROUP=tuning.TILE_GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if not whole:
        finish(y, out, bias, residual, gated, x.dtype)
