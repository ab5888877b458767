"""Gradients of `quant_moe` by x and the routing weights: `moe_backward`, dequantizing on the way.

A tile of weights is dequantized in registers and rounded to the compute dtype, as a stored copy of
it would be; each tile serves all rows of a tile of tokens. Rows are the long side of the matrix
instruction, for the weight's tile passes through registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe_tuning
from .grouped_matmul import dense_rows, grouped_product
from .moe import combine
from .moe_backward import down_gradient, router_gradient, store_activation_gradients
from .moe_plan import Plan, plan, replanned, tile_of_plan, token_of_row
from .quant_format import kernel_format
from .quant_matmul_input_grad import weight_tile
from .quant_moe import ExpertWeights
from .triton_compat import cast, dot
from .tuning import ProductTile


@triton.jit
def input_gradient_tile(
    dy_rows,
    live,
    data_ptr,
    scales_ptr,
    expert,
    tile_k,
    N,
    K,
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_K]: rows of dy times columns of an expert's weight [N, K]."""
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    before = expert.to(tl.int64) * N
    for n in range(0, N, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        mask = live[:, None] & (rows < N)[None, :]
        dy = tl.load(dy_rows[:, None] + rows[None, :], mask=mask, other=0.0)
        w = weight_tile(
            data_ptr, scales_ptr, before + rows, tile_k * (BLOCK_K // 32), before + N, K // 32,
            FORMAT, BLOCK_K, dy.dtype,
        )  # fmt: skip
        acc = dot(dy, w, acc)
    return acc


@triton.jit
def quant_moe_down_grad_kernel(
    dpre_ptr,
    partial_ptr,
    dy_ptr,
    data_ptr,
    scales_ptr,
    pre_ptr,
    weights_ptr,
    tiles_ptr,
    slots_ptr,
    stride_dy,
    n_tiles,
    n_slots,
    per_token,
    N,
    width,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_k = tl.cdiv(width, BLOCK_K)
    expert, first, end = tile_of_plan(tiles_ptr, n_tiles, tl.program_id(0) // tiles_k)
    if expert < 0:
        return
    tile_k = tl.program_id(0) % tiles_k
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    rows_m = first + tl.arange(0, BLOCK_M)
    token, live = token_of_row(slots_ptr, rows_m, rows_m < end, n_slots, per_token)
    da = input_gradient_tile(
        dy_ptr + token * stride_dy, live, data_ptr, scales_ptr, expert, tile_k, N, width,
        FORMAT, BLOCK_K, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    partial = partial_ptr + tile_k.to(tl.int64) * n_slots
    store_activation_gradients(
        dpre_ptr, dpre_ptr, partial, da, pre_ptr, weights_ptr, slots_ptr,
        first, end, cols, width, n_slots, ACTIVATION, False, BLOCK_M,
    )  # fmt: skip


@triton.jit
def quant_grouped_input_grad_kernel(
    dx_ptr,
    dy_ptr,
    data_ptr,
    scales_ptr,
    tiles_ptr,
    stride_dy,
    n_tiles,
    N,
    K,
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    expert, first, end = tile_of_plan(tiles_ptr, n_tiles, tl.program_id(0) // tiles_k)
    if expert < 0:
        return
    tile_k = tl.program_id(0) % tiles_k
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    rows_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = rows_m < end
    dx = input_gradient_tile(
        dy_ptr + rows_m * stride_dy, live, data_ptr, scales_ptr, expert, tile_k, N, K,
        FORMAT, BLOCK_K, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    out = dx_ptr + rows_m[:, None] * K + cols[None, :]
    mask = live[:, None] & (cols < K)[None, :]
    tl.store(out, cast(dx, dx_ptr.dtype.element_ty), mask=mask)


def quant_down_gradient(
    dy: Tensor,
    down: ExpertWeights,
    pre: Tensor,
    topk_weights: Tensor,
    rows: Plan,
    tile: ProductTile,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(dpre [P, 2I], partial sums of <dA', a> f32 [tiles, P]) through quantized down weights."""
    dpre, n_slots = torch.empty_like(pre), pre.shape[0]
    tiles_k = triton.cdiv(down.k, tile.n)
    partial = pre.new_empty((tiles_k, n_slots), dtype=torch.float32)
    quant_moe_down_grad_kernel[(rows.n_tiles * tiles_k,)](
        dpre,
        partial,
        dy,
        down.data,
        down.scales,
        pre,
        topk_weights,
        rows.tiles,
        rows.slots,
        dy.stride(0),
        rows.n_tiles,
        n_slots,
        n_slots // dy.shape[0],
        down.n,
        down.k,
        FORMAT=kernel_format(down.format),
        ACTIVATION=activation,
        BLOCK_K=tile.n,
        BLOCK_M=tile.m,
        BLOCK_N=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
    return dpre, partial


def quant_input_gradient(
    dy: Tensor, weight: ExpertWeights, rows: Plan, tile: ProductTile
) -> Tensor:
    """dx f32 [P, K] of dy[P, N] and quantized weights, rows as planned."""
    dx = torch.empty((dy.shape[0], weight.k), dtype=torch.float32, device=dy.device)
    quant_grouped_input_grad_kernel[(rows.n_tiles * triton.cdiv(weight.k, tile.n),)](
        dx,
        dy,
        weight.data,
        weight.scales,
        rows.tiles,
        dy.stride(0),
        rows.n_tiles,
        weight.n,
        weight.k,
        FORMAT=kernel_format(weight.format),
        BLOCK_K=tile.n,
        BLOCK_M=tile.m,
        BLOCK_N=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
    return dx


def quant_moe_backward(
    dy: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_format: str,
    down: Tensor,
    down_scales: Tensor,
    down_format: str,
    topk_weights: Tensor,
    offsets: Tensor,
    slots: Tensor,
    pre: Tensor,
    down_bias: Tensor | None,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x [T, H] (pre's dtype) and of topk_weights (f32); unwanted ones are [0].

    dy[T, H]: rounded to pre's dtype; weights packed for the GPU (R = 1); the rest as in
    `moe_backward`. Raises ValueError for a format or layout not served.
    """
    n_tokens, hidden = dy.shape
    n_slots, inner = pre.shape[0], pre.shape[1] // 2
    first = ExpertWeights(gate_up, gate_up_scales, gate_up_format, 2 * inner, hidden)
    second = ExpertWeights(down, down_scales, down_format, hidden, inner)
    first.check()
    second.check()
    if pre.numel() == 0 or gate_up.numel() == 0:
        dx = dy.new_zeros(dy.shape if wanted[0] else (0,), dtype=pre.dtype)
        return dx, torch.zeros_like(topk_weights) if wanted[1] else topk_weights.new_empty(0)
    g, weights = dense_rows(dy.to(pre.dtype)), topk_weights.contiguous()
    mean = moe_tuning.mean_rows(n_slots, gate_up.shape[0])
    if second.quantized:
        tile = moe_tuning.quant_input_grad_tile(mean, pre.dtype, pre.device, epilogue=True)
        rows = plan(offsets, slots, n_slots, tile.m, tail=False)
        dpre, partial = quant_down_gradient(g, second, pre, weights, rows, tile, activation)
    else:
        tile = moe_tuning.down_grad_tile(mean, pre.dtype, pre.device)
        rows = plan(offsets, slots, n_slots, tile.m, tail=False)
        dpre, _, partial = down_gradient(
            g, second.dense(), pre, weights, rows, tile, activation, False
        )
    dx, dweights = pre.new_empty(0), weights.new_empty(0)
    if wanted[1]:
        dweights = router_gradient(partial, g, down_bias, offsets, rows)
    if wanted[0]:
        dslots = _slot_gradients(dpre, first, rows, offsets, mean)
        dx = combine(dslots, rows, n_tokens, None, None, pre.dtype)
    return dx, dweights


def _slot_gradients(
    dpre: Tensor, weight: ExpertWeights, rows: Plan, offsets: Tensor, mean: int
) -> Tensor:
    """f32 [P, H]: what each slot gives to the gradient of x."""
    if weight.quantized:
        tile = moe_tuning.quant_input_grad_tile(mean, dpre.dtype, dpre.device, epilogue=False)
        return quant_input_gradient(dpre, weight, replanned(rows, offsets, tile.m), tile)
    tile = moe_tuning.product_tile(mean, dpre.dtype, dpre.device)
    planned = replanned(rows, offsets, tile.m)
    return grouped_product(
        dpre, weight.dense(), None, torch.float32, planned, tile, transposed=True
    )
