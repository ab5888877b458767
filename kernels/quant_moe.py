"""The fused mixture-of-experts layer with packed experts: `moe`, dequantizing in the K loops.

Units of columns are multiplied as in `quant_matmul`, rows are gathered and activated as in `moe`.
In modes int8 and fp8 tokens are quantized once, whatever the number of experts they go to, and the
activations once a slot. Formats "bf16" and "f32" are dense weights and take the kernels of `moe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe_tuning
from .grouped_matmul import dense_rows, grouped_product
from .moe import combine, contiguous, gate_up, store_activation
from .moe_plan import Plan, plan, replanned, tile_of_plan, token_of_row
from .quant_activation import prepared
from .quant_blocks import add_units, gate_up_units
from .quant_format import (
    DENSE,
    FORMATS,
    kernel_format,
    modes,
    unit_columns,
    weight_rows,
)
from .triton_compat import cast
from .tuning import ProductTile, quant_tile


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Packed weights [E, n, k], a row a group (R = 1), as `fastllm.ops.packed_layout` says."""

    data: Tensor
    scales: Tensor
    format: str
    n: int
    k: int

    @property
    def quantized(self) -> bool:
        return self.format in FORMATS

    def mode(self, mode: str) -> str:
        """This weight's mode in a layer of that mode: e4m3 codes have fp8 for int8."""
        if mode not in ("int8", "fp8"):
            return mode
        return modes(self.format)[0]

    def dense(self) -> Tensor:
        """[E, n, k] of a dense format: a view."""
        return self.data.view(self.data.shape[0], self.n, -1)[..., : self.k]

    def check(self) -> None:
        """Raises ValueError for a format or layout not served here."""
        if self.format not in FORMATS and self.format not in DENSE:
            raise ValueError(f"format {self.format!r} is not a packed format")
        if self.data.shape[3 if self.format == "f32" else -2] != 1:
            raise ValueError(
                f"data of shape {tuple(self.data.shape)} interleaves rows; pack it for the GPU "
                "(R = 1)"
            )


@triton.jit
def quant_moe_gate_up_kernel(
    a_ptr,
    pre_ptr,
    x_ptr,
    x_scales_ptr,
    x_sums_ptr,
    data_ptr,
    scales_ptr,
    bias_ptr,
    tiles_ptr,
    slots_ptr,
    stride_xm,
    n_tiles,
    n_slots,
    per_token,
    width,
    K,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    SHORT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNITS: tl.constexpr,
):
    UNIT: tl.constexpr = unit_columns(FORMAT, MODE)
    n_units = tl.cdiv(K, UNIT)
    tiles_n = tl.cdiv(width, BLOCK_N)
    expert, first, end = tile_of_plan(tiles_ptr, n_tiles, tl.program_id(0) // tiles_n)
    if expert < 0:
        return
    rows_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = first + tl.arange(0, BLOCK_M)
    token, live = token_of_row(slots_ptr, rows_m, rows_m < end, n_slots, per_token)
    x_rows, places = x_ptr + token * stride_xm, token * n_units
    inside = rows_n < width
    rows_gate = expert.to(tl.int64) * 2 * width + rows_n
    gate_data, gate_scales = weight_rows(data_ptr, scales_ptr, rows_gate, K // 32, FORMAT)
    up_data, up_scales = weight_rows(data_ptr, scales_ptr, rows_gate + width, K // 32, FORMAT)
    gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    gate, up = gate_up_units(
        gate, gate, x_rows, x_scales_ptr, x_sums_ptr, places, gate_data, gate_scales, up_data,
        up_scales, inside, live, K, n_units, FORMAT, MODE, SHORT, UNITS,
    )  # fmt: skip
    store_activation(
        a_ptr, pre_ptr, gate, up, bias_ptr, expert, rows_m, end, rows_n, width,
        ACTIVATION, KEEP, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def quant_grouped_matmul_kernel(
    y_ptr,
    x_ptr,
    x_scales_ptr,
    x_sums_ptr,
    data_ptr,
    scales_ptr,
    bias_ptr,
    tiles_ptr,
    stride_xm,
    n_tiles,
    N,
    K,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNITS: tl.constexpr,
):
    UNIT: tl.constexpr = unit_columns(FORMAT, MODE)
    n_units = tl.cdiv(K, UNIT)
    tiles_n = tl.cdiv(N, BLOCK_N)
    expert, first, end = tile_of_plan(tiles_ptr, n_tiles, tl.program_id(0) // tiles_n)
    if expert < 0:
        return
    rows_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = rows_m < end
    x_rows, places, inside = x_ptr + rows_m * stride_xm, rows_m * n_units, rows_n < N
    data_rows, scale_rows = weight_rows(
        data_ptr, scales_ptr, expert.to(tl.int64) * N + rows_n, K // 32, FORMAT
    )
    acc = add_units(
        tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), x_rows, x_scales_ptr, x_sums_ptr, places,
        data_rows, scale_rows, inside, live, K, 0, n_units, FORMAT, MODE, SHORT, UNITS,
    )  # fmt: skip
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * N + rows_n
        acc += tl.load(bias, mask=rows_n < N, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(cast(acc, y_ptr.dtype.element_ty))
    out = y_ptr + rows_m[:, None] * N + rows_n[None, :]
    tl.store(out, y, mask=live[:, None] & (rows_n < N)[None, :])


def quant_gate_up(
    x: Tensor,
    weight: ExpertWeights,
    bias: Tensor | None,
    rows: Plan,
    tile: ProductTile,
    activation: str,
    mode: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(a [P, I], pre [P, 2I] or [0, 2I]) in x's dtype, of quantized weights."""
    width, n_slots = weight.n // 2, rows.slots.shape[0]
    a = torch.empty((n_slots, width), dtype=x.dtype, device=x.device)
    pre = torch.empty((n_slots if keep else 0, 2 * width), dtype=x.dtype, device=x.device)
    if a.numel() == 0 or rows.n_tiles == 0:
        return a, pre
    mode = weight.mode(mode)
    unit = int(unit_columns(weight.format, mode))
    values, x_scales, x_sums = prepared(x, weight.format, mode)
    quant_moe_gate_up_kernel[(rows.n_tiles * triton.cdiv(width, tile.n),)](
        a,
        pre if keep else a,
        values,
        x_scales,
        x_sums,
        weight.data,
        weight.scales,
        x if bias is None else bias,
        rows.tiles,
        rows.slots,
        values.stride(0),
        rows.n_tiles,
        n_slots,
        n_slots // x.shape[0],
        width,
        weight.k,
        FORMAT=kernel_format(weight.format),
        MODE=mode,
        SHORT=weight.k % unit != 0,
        ACTIVATION=activation,
        KEEP=keep,
        HAS_BIAS=bias is not None,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        UNITS=max(1, tile.k // unit),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return a, pre


def quant_grouped_product(
    x: Tensor,
    weight: ExpertWeights,
    bias: Tensor | None,
    mode: str,
    rows: Plan,
    tile: ProductTile,
) -> Tensor:
    """y f32 [P, N] of x[P, K] and quantized weights, rows as planned."""
    y = torch.empty((x.shape[0], weight.n), dtype=torch.float32, device=x.device)
    if y.numel() == 0 or rows.n_tiles == 0:
        return y
    mode = weight.mode(mode)
    unit = int(unit_columns(weight.format, mode))
    values, x_scales, x_sums = prepared(x, weight.format, mode)
    quant_grouped_matmul_kernel[(rows.n_tiles * triton.cdiv(weight.n, tile.n),)](
        y,
        values,
        x_scales,
        x_sums,
        weight.data,
        weight.scales,
        x if bias is None else bias,
        rows.tiles,
        values.stride(0),
        rows.n_tiles,
        weight.n,
        weight.k,
        FORMAT=kernel_format(weight.format),
        MODE=mode,
        SHORT=weight.k % unit != 0,
        HAS_BIAS=bias is not None,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        UNITS=max(1, tile.k // unit),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def quant_moe(
    x: Tensor,
    gate_up_data: Tensor,
    gate_up_scales: Tensor,
    gate_up_format: str,
    down_data: Tensor,
    down_scales: Tensor,
    down_format: str,
    inner: int,
    topk_weights: Tensor,
    offsets: Tensor,
    slots: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    base: Tensor | None,
    activation: str,
    mode: str,
    keep: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [T, H], pre [T * k, 2 inner] or [0, 2 inner]): `moe` of packed experts.

    x[T, H]: f32 or bf16; data and scales: [E, ...] packed for the GPU (R = 1); mode: "int8" or
    "fp8" (each weight takes the one it has), "bf16" (x bf16) or "fp32" (x f32), ignored by the
    dense formats; the rest as in `moe`. Raises ValueError for a format or layout not served.
    """
    hidden, n_slots = x.shape[1], slots.shape[0]
    first = ExpertWeights(gate_up_data, gate_up_scales, gate_up_format, 2 * inner, hidden)
    second = ExpertWeights(down_data, down_scales, down_format, hidden, inner)
    first.check()
    second.check()
    x = dense_rows(x)
    bias1, bias2, base = contiguous(gate_up_bias, down_bias, base)
    mean = moe_tuning.mean_rows(n_slots, gate_up_data.shape[0])
    if first.quantized:
        tile = quant_tile(mean, first.format, first.mode(mode), True, x.device)
        rows = plan(offsets, slots, n_slots, tile.m, tail=False)
        a, pre = quant_gate_up(x, first, bias1, rows, tile, activation, mode, keep)
    else:
        tile = moe_tuning.gate_up_tile(mean, x.dtype, x.device)
        rows = plan(offsets, slots, n_slots, tile.m, tail=False)
        a, pre = gate_up(x, first.dense(), bias1, rows, tile, activation, keep)
    if second.quantized:
        tile = quant_tile(mean, second.format, second.mode(mode), False, x.device)
        planned = replanned(rows, offsets, tile.m)
        o = quant_grouped_product(a, second, bias2, mode, planned, tile)
    else:
        tile = moe_tuning.product_tile(mean, x.dtype, x.device)
        planned = replanned(rows, offsets, tile.m)
        o = grouped_product(a, second.dense(), bias2, torch.float32, planned, tile)
    y = combine(o, rows, x.shape[0], topk_weights.contiguous(), base, out_dtype or x.dtype)
    return y, pre
