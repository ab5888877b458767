"""The fused mixture-of-experts layer with packed experts: `moe`, dequantizing in the K loops.

Blocks of 32 columns are multiplied as in `quant_matmul`, rows are gathered and activated as in
`moe`. In mode int8 tokens are quantized once, whatever the number of experts they go to, and the
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
from .quant_blocks import activation_block, add_block
from .quant_format import BYTES_PER_BLOCK
from .quant_matmul import quantize_activation
from .triton_compat import cast
from .tuning import ProductTile


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
        return self.format in BYTES_PER_BLOCK

    @property
    def n_blocks(self) -> int:
        return self.k // 32

    def dense(self) -> Tensor:
        """[E, n, k] of a dense format: a view."""
        return self.data.view(self.data.shape[0], self.n, -1)[..., : self.k]

    def check(self) -> None:
        """Raises ValueError for a format or layout not served here."""
        if self.format not in (*BYTES_PER_BLOCK, "bf16", "f32"):
            raise ValueError(f"format {self.format!r} is not a packed format")
        if self.data.shape[3 if self.format == "f32" else -2] != 1:
            raise ValueError(
                f"data of shape {tuple(self.data.shape)} interleaves rows; pack it for the GPU "
                "(R = 1)"
            )


@triton.jit
def expert_pointers(data_ptr, scales_ptr, expert, n_blocks, FORMAT: tl.constexpr):
    """Where data and scales of an expert begin; n_blocks: of a whole expert."""
    first = expert.to(tl.int64) * n_blocks
    BYTES: tl.constexpr = 32 if FORMAT == "q8_0" else 16
    N_SCALES: tl.constexpr = 2 if FORMAT == "q4_1" else 1
    return data_ptr + first * BYTES, scales_ptr + first * N_SCALES


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
    n_blocks,
    FORMAT: tl.constexpr,
    INT8: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    tiles_n = tl.cdiv(width, BLOCK_N)
    expert, first, end = tile_of_plan(tiles_ptr, n_tiles, tl.program_id(0) // tiles_n)
    if expert < 0:
        return
    rows_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = first + tl.arange(0, BLOCK_M)
    token, live = token_of_row(slots_ptr, rows_m, rows_m < end, n_slots, per_token)
    x_rows, blocks_m = x_ptr + token * stride_xm, token * n_blocks
    data, scales = expert_pointers(data_ptr, scales_ptr, expert, 2 * width * n_blocks, FORMAT)
    blocks_gate = rows_n.to(tl.int64) * n_blocks
    blocks_up = (width + rows_n).to(tl.int64) * n_blocks
    gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for b0 in range(0, n_blocks, BLOCKS):
        for i in tl.static_range(BLOCKS):
            b = b0 + i
            mask_n, mask_m = (rows_n < width) & (b < n_blocks), live & (b < n_blocks)
            x = activation_block(
                x_rows + b * 32, x_scales_ptr, x_sums_ptr, blocks_m + b, mask_m, FORMAT, INT8
            )
            gate = add_block(gate, x, data, scales, blocks_gate + b, mask_n, FORMAT, INT8)
            up = add_block(up, x, data, scales, blocks_up + b, mask_n, FORMAT, INT8)
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
    n_blocks,
    FORMAT: tl.constexpr,
    INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    expert, first, end = tile_of_plan(tiles_ptr, n_tiles, tl.program_id(0) // tiles_n)
    if expert < 0:
        return
    rows_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = rows_m < end
    x_rows, blocks_m = x_ptr + rows_m * stride_xm, rows_m * n_blocks
    data, scales = expert_pointers(data_ptr, scales_ptr, expert, N * n_blocks, FORMAT)
    blocks_n = rows_n.to(tl.int64) * n_blocks
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for b0 in range(0, n_blocks, BLOCKS):
        for i in tl.static_range(BLOCKS):
            b = b0 + i
            mask_n, mask_m = (rows_n < N) & (b < n_blocks), live & (b < n_blocks)
            x = activation_block(
                x_rows + b * 32, x_scales_ptr, x_sums_ptr, blocks_m + b, mask_m, FORMAT, INT8
            )
            acc = add_block(acc, x, data, scales, blocks_n + b, mask_n, FORMAT, INT8)
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * N + rows_n
        acc += tl.load(bias, mask=rows_n < N, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(cast(acc, y_ptr.dtype.element_ty))
    out = y_ptr + rows_m[:, None] * N + rows_n[None, :]
    tl.store(out, y, mask=live[:, None] & (rows_n < N)[None, :])


def prepared_rows(x: Tensor, format: str, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scales, sums) of x[M, K] as `activation_block` reads them."""
    if mode == "int8":
        return quantize_activation(x, paired=format != "q8_0")
    sums = x.new_empty(0, dtype=torch.float32)
    if format == "q4_1":
        sums = quantize_activation(x, paired=False, int8=False)[2]
    return x, sums, sums


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
    values, x_scales, x_sums = prepared_rows(x, weight.format, mode)
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
        weight.n_blocks,
        FORMAT=weight.format,
        INT8=mode == "int8",
        ACTIVATION=activation,
        KEEP=keep,
        HAS_BIAS=bias is not None,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCKS=tile.k // 32,
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
    values, x_scales, x_sums = prepared_rows(x, weight.format, mode)
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
        weight.n_blocks,
        FORMAT=weight.format,
        INT8=mode == "int8",
        HAS_BIAS=bias is not None,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCKS=tile.k // 32,
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

    x[T, H]: f32 or bf16; data and scales: [E, ...] packed for the GPU (R = 1); mode: "int8", "bf16"
    (x bf16) or "fp32" (x f32), ignored by the dense formats; the rest as in `moe`. Raises
    ValueError for a format or layout not served.
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
        tile = moe_tuning.quant_gate_up_tile(mean, mode)
        rows = plan(offsets, slots, n_slots, tile.m, tail=False)
        a, pre = quant_gate_up(x, first, bias1, rows, tile, activation, mode, keep)
    else:
        tile = moe_tuning.gate_up_tile(mean, x.dtype, x.device)
        rows = plan(offsets, slots, n_slots, tile.m, tail=False)
        a, pre = gate_up(x, first.dense(), bias1, rows, tile, activation, keep)
    if second.quantized:
        tile = moe_tuning.quant_product_tile(mean, mode)
        planned = replanned(rows, offsets, tile.m)
        o = quant_grouped_product(a, second, bias2, mode, planned, tile)
    else:
        tile = moe_tuning.product_tile(mean, x.dtype, x.device)
        planned = replanned(rows, offsets, tile.m)
        o = grouped_product(a, second.dense(), bias2, torch.float32, planned, tile)
    y = combine(o, rows, x.shape[0], topk_weights.contiguous(), base, out_dtype or x.dtype)
    return y, pre
