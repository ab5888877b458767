"""Gradients of the mixture-of-experts layer from x, topk_weights, the slots' order and pre alone.

The product of dy with the down weight, dA', gives everything else in its epilogue: the router's
gradient <dA', a> (a is computed again from pre; partial sums of each tile, added in order by a
second kernel), dpre, and round(w * a), the factor of the down weight's gradient. No output of an
expert is kept or computed again. Every sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe_tuning
from .grouped_matmul import dense_rows, grouped_product, rows_tile, weight_argument, weight_tile
from .grouped_weight_grad import grouped_bias_grad, grouped_weight_grad
from .moe import combine
from .moe_activation import activation_gradients
from .moe_plan import Plan, plan, replanned, row_of_slot, tile_of_plan, token_of_row
from .triton_compat import cast, dot, recomputed
from .tuning import ProductTile

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def store_activation_gradients(
    dpre_ptr,
    scaled_ptr,
    partial_ptr,
    da,
    pre_ptr,
    weights_ptr,
    slots_ptr,
    first,
    end,
    rows_n,
    width,
    n_slots,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Stores dpre, w * a and the tile's part of <dA', a> of da = dA' [ROWS, BLOCK_N]."""
    dtype: tl.constexpr = dpre_ptr.dtype.element_ty
    rows_m = recomputed(first + tl.arange(0, ROWS))
    slot = tl.load(slots_ptr + rows_m, mask=rows_m < end, other=-1)
    live = (slot >= 0) & (slot < n_slots)
    mask = live[:, None] & (rows_n < width)[None, :]
    row = rows_m.to(tl.int64)[:, None] * 2 * width + rows_n[None, :]
    gate = tl.load(pre_ptr + row, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + row + width, mask=mask, other=0.0).to(tl.float32)
    a, by_gate, by_up = activation_gradients(gate, up, ACTIVATION)
    a = cast(a, dtype).to(tl.float32)
    w = tl.load(weights_ptr + slot, mask=live, other=0.0)[:, None]
    tl.store(partial_ptr + rows_m, tl.sum(tl.where(mask, da * a, 0.0), axis=1), mask=live)
    if SCALED:
        at = scaled_ptr + rows_m.to(tl.int64)[:, None] * width + rows_n[None, :]
        tl.store(at, cast(w * a, dtype), mask=mask)
    da = w * da
    tl.store(dpre_ptr + row, cast(da * by_gate, dtype), mask=mask)
    tl.store(dpre_ptr + row + width, cast(da * by_up, dtype), mask=mask)


@triton.jit
def moe_down_grad_kernel(
    dpre_ptr,
    scaled_ptr,
    partial_ptr,
    dy_ptr,
    weight,
    pre_ptr,
    weights_ptr,
    tiles_ptr,
    slots_ptr,
    stride_dy,
    stride_we,
    stride_wk,
    n_tiles,
    n_slots,
    per_token,
    width,
    K,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(width, BLOCK_N)
    expert, first, end = tile_of_plan(tiles_ptr, n_tiles, tl.program_id(0) // tiles_n)
    if expert < 0:
        return
    tile_n = tl.program_id(0) % tiles_n
    rows_m = first + tl.arange(0, BLOCK_M)
    token, live = token_of_row(slots_ptr, rows_m, rows_m < end, n_slots, per_token)
    dy_rows = dy_ptr + token * stride_dy
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        w = weight_tile(
            weight, expert, tile_n * BLOCK_N, k, width, K, stride_we, 1, stride_wk,
            EVEN_K, True, DESCRIPTOR, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = dot(w, rows_tile(dy_rows, live, k, K, EVEN_K, BLOCK_K), acc)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    partial = partial_ptr + tile_n.to(tl.int64) * n_slots
    if BLOCK_M < 128:
        store_activation_gradients(
            dpre_ptr, scaled_ptr, partial, tl.trans(acc), pre_ptr, weights_ptr, slots_ptr,
            first, end, rows_n, width, n_slots, ACTIVATION, SCALED, BLOCK_M,
        )  # fmt: skip
    else:  # a quarter of the rows after the other: all at once do not fit in the registers
        halves = acc.reshape(BLOCK_N, 2, BLOCK_M // 2).permute(0, 2, 1).split()
        for i in tl.static_range(4):
            half = halves[i // 2].reshape(BLOCK_N, 2, BLOCK_M // 4).permute(0, 2, 1).split()
            store_activation_gradients(
                dpre_ptr, scaled_ptr, partial, tl.trans(half[i % 2]), pre_ptr, weights_ptr,
                slots_ptr, first + i * (BLOCK_M // 4), end, rows_n, width, n_slots,
                ACTIVATION, SCALED, BLOCK_M // 4,
            )  # fmt: skip


@triton.jit
def moe_router_grad_kernel(
    dweights_ptr,
    partial_ptr,
    dy_ptr,
    bias_ptr,
    offsets_ptr,
    row_of_slot_ptr,
    slots_ptr,
    stride_dy,
    n_slots,
    n_partials,
    n_experts,
    per_token,
    N,
    HAS_BIAS: tl.constexpr,
    PARTIALS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dweights[slot] = sum of its row's partial sums, plus <dy, down bias>; 0 without a row."""
    slot = tl.program_id(0)
    row, live = row_of_slot(row_of_slot_ptr, slots_ptr, slot, n_slots)
    part = tl.arange(0, PARTIALS)
    at = partial_ptr + part.to(tl.int64) * n_slots + row
    total = tl.sum(tl.load(at, mask=live & (part < n_partials), other=0.0), axis=0)
    if HAS_BIAS:
        e = tl.arange(0, EXPERTS)
        ends = tl.load(offsets_ptr + e + 1, mask=e < n_experts, other=n_slots + 1)
        expert = tl.minimum(tl.sum((ends <= row).to(tl.int32), axis=0), n_experts - 1)
        dy = dy_ptr + (slot // per_token).to(tl.int64) * stride_dy
        bias = bias_ptr + expert.to(tl.int64) * N
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, N, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            mask = live & (cols < N)
            value = tl.load(dy + cols, mask=mask, other=0.0).to(tl.float32)
            sums += value * tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(sums, axis=0)
    tl.store(dweights_ptr + slot, total)


def router_gradient(
    partial: Tensor,
    dy: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    rows: Plan,
) -> Tensor:
    """dweights f32 [T, k] of partial f32 [tiles, T * k], and of dy[T, H] with bias[E, H]."""
    n_partials, n_slots = partial.shape
    shape = dy.shape[0], n_slots // dy.shape[0]
    dweights = torch.empty(shape, dtype=torch.float32, device=dy.device)
    bias = None if bias is None else bias.contiguous()
    n_experts, n = offsets.shape[0] - 1, dy.shape[1]
    moe_router_grad_kernel[(n_slots,)](
        dweights,
        partial,
        dy,
        dy if bias is None else bias,
        offsets,
        rows.row_of_slot,
        rows.slots,
        dy.stride(0),
        n_slots,
        n_partials,
        n_experts,
        dweights.shape[1],
        n,
        HAS_BIAS=bias is not None,
        PARTIALS=triton.next_power_of_2(n_partials),
        EXPERTS=triton.next_power_of_2(n_experts),
        BLOCK=min(triton.next_power_of_2(n), moe_tuning.ROUTER_GRAD_BLOCK),
        num_warps=1 if bias is None else 4,
    )
    return dweights


def down_gradient(
    dy: Tensor,
    down: Tensor,
    pre: Tensor,
    topk_weights: Tensor,
    rows: Plan,
    tile: ProductTile,
    activation: str,
    scaled: bool,
    descriptor: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dpre [P, 2I], w * a [P, I] or [0, I], partial sums of <dA', a> f32 [tiles, P])."""
    (n_slots, _), width, k = pre.shape, down.shape[2], down.shape[1]
    dpre = torch.empty_like(pre)
    wa = pre.new_empty((n_slots if scaled else 0, width))
    partial = pre.new_empty((triton.cdiv(width, tile.n), n_slots), dtype=torch.float32)
    if descriptor is None:
        descriptor = moe_tuning.use_descriptors(down)
    moe_down_grad_kernel[(rows.n_tiles * partial.shape[0],)](
        dpre,
        wa if scaled else dpre,
        partial,
        dy,
        weight_argument(down, tile.n, tile.k, descriptor, True),
        pre,
        topk_weights,
        rows.tiles,
        rows.slots,
        dy.stride(0),
        down.stride(0),
        down.stride(1),
        rows.n_tiles,
        n_slots,
        n_slots // dy.shape[0],
        width,
        k,
        ACTIVATION=activation,
        SCALED=scaled,
        EVEN_K=k % tile.k == 0,
        DESCRIPTOR=descriptor,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dpre, wa, partial


def moe_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    offsets: Tensor,
    slots: Tensor,
    pre: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    wanted: list[bool],
    gate_up_dtype: torch.dtype,
    down_dtype: torch.dtype,
    *,
    descriptor: bool | None = None,
) -> Gradients:
    """Gradients of x, gate_up, down, topk_weights (f32), biases (f32); unwanted ones are [0].

    dy[T, H] (rounded to x's dtype), x[T, H], gate_up[E, 2I, H], down[E, H, I] and pre[T * k, 2I]:
    all f32 or all bf16; topk_weights f32 [T, k]; offsets int32 [E + 1], slots int32 [T * k];
    down_bias[E, H]: any float. gate_up_dtype, down_dtype: of the gradients of the weights.
    """
    if pre.numel() == 0 or gate_up.numel() == 0:
        return _zeros(x, gate_up, down, topk_weights, wanted, gate_up_dtype, down_dtype)
    x, gate_up, down = dense_rows(x), dense_rows(gate_up), dense_rows(down)
    g, weights = dense_rows(dy.to(x.dtype)), topk_weights.contiguous()
    mean = moe_tuning.mean_rows(slots.shape[0], gate_up.shape[0])
    tile = moe_tuning.down_grad_tile(mean, x.dtype, x.device)
    rows = plan(offsets, slots, slots.shape[0], tile.m, tail=False)
    dpre, wa, partial = down_gradient(
        g, down, pre, weights, rows, tile, activation, wanted[2], descriptor
    )
    dx = dgate_up = ddown = dweights = dbias1 = dbias2 = x.new_empty(0)
    if wanted[3]:
        dweights = router_gradient(partial, g, down_bias, offsets, rows)
    if wanted[0]:
        second = moe_tuning.product_tile(mean, x.dtype, x.device)
        dslots = grouped_product(
            dpre, gate_up, None, torch.float32, replanned(rows, offsets, second.m), second,
            transposed=True, descriptor=descriptor,
        )  # fmt: skip
        dx = combine(dslots, rows, x.shape[0], None, None, x.dtype)
    if wanted[1]:
        dgate_up = grouped_weight_grad(dpre, x, offsets, gate_up_dtype, slots, gather_x=True)
    if wanted[2]:
        ddown = grouped_weight_grad(g, wa, offsets, down_dtype, slots, gather_dy=True)
    if wanted[4]:
        dbias1 = grouped_bias_grad(dpre, offsets, torch.float32)
    if wanted[5]:
        dbias2 = grouped_bias_grad(g, offsets, torch.float32, slots, weights)
    return dx, dgate_up, ddown, dweights, dbias1, dbias2


def _zeros(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    wanted: list[bool],
    gate_up_dtype: torch.dtype,
    down_dtype: torch.dtype,
) -> Gradients:
    """What no rows give."""
    f32 = torch.float32
    shapes = (x, gate_up, down, topk_weights, gate_up[..., 0], down[..., 0])
    dtypes = (x.dtype, gate_up_dtype, down_dtype, f32, f32, f32)
    found = [
        x.new_zeros(like.shape if want else (0,), dtype=dtype)
        for like, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    ]
    return found[0], found[1], found[2], found[3], found[4], found[5]
