"""The fused mixture-of-experts layer: gather, gate and up, activation, down, weighted combine.

Three kernels after the plan. The first gathers the rows of x inside its loads and applies bias and
activation before its only store; the second multiplies by the down weights into fp32, a row each
slot; the third adds a token's slots in slot order, times their weights, and rounds once. Nothing
is added atomically and no row's sums depend on other rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe_tuning
from .grouped_matmul import dense_rows, grouped_product, rows_tile, weight_argument, weight_tile
from .moe_activation import activate
from .moe_plan import Plan, plan, replanned, row_of_slot, tile_of_plan, token_of_row
from .triton_compat import cast, dot, forgotten, recomputed
from .tuning import ProductTile


@triton.jit
def add_bias(acc, bias_ptr, rows_n, mask_n):
    """acc[BLOCK_N, rows] + bias[rows_n]."""
    return acc + tl.load(bias_ptr + rows_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]


@triton.jit
def store_activation(
    a_ptr,
    pre_ptr,
    gate,
    up,
    bias_ptr,
    expert,
    rows_m,
    end,
    rows_n,
    width,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Stores pre (if kept) and a of the fp32 sums gate and up [BLOCK_N, BLOCK_M]."""
    mask_n = rows_n < width
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * 2 * width
        gate = add_bias(gate, bias, rows_n, mask_n)
        up = add_bias(up, bias + width, rows_n, mask_n)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    gate, up = forgotten(cast(gate, dtype)), forgotten(cast(up, dtype))
    a = cast(activate(gate.to(tl.float32), up.to(tl.float32), ACTIVATION), dtype)
    store_rows(a_ptr, a, rows_m, end, rows_n, mask_n, width)
    if KEEP:
        store_rows(pre_ptr, gate, rows_m, end, rows_n, mask_n, 2 * width)
        store_rows(pre_ptr + width, up, rows_m, end, rows_n, mask_n, 2 * width)


@triton.jit
def store_rows(y_ptr, y, rows_m, end, rows_n, mask_n, stride):
    """Stores y[BLOCK_N, BLOCK_M] as rows of y_ptr; addresses are computed here, not kept."""
    rows_m = recomputed(rows_m)
    row = y_ptr + rows_m.to(tl.int64)[:, None] * stride + rows_n[None, :]
    tl.store(row, tl.trans(y), mask=(rows_m < end)[:, None] & mask_n[None, :])


@triton.jit
def moe_gate_up_kernel(
    a_ptr,
    pre_ptr,
    x_ptr,
    weight,
    bias_ptr,
    tiles_ptr,
    slots_ptr,
    stride_xm,
    stride_we,
    stride_wn,
    n_tiles,
    n_slots,
    per_token,
    width,
    K,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    rows_m = first + tl.arange(0, BLOCK_M)
    token, live = token_of_row(slots_ptr, rows_m, rows_m < end, n_slots, per_token)
    x_rows = x_ptr + token * stride_xm
    gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = rows_tile(x_rows, live, k, K, EVEN_K, BLOCK_K)
        w = weight_tile(
            weight, expert, first_n, k, width, K, stride_we, stride_wn, 1,
            EVEN_K, False, DESCRIPTOR, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        gate = dot(w, x, gate)
        w = weight_tile(
            weight, expert, width + first_n, k, 2 * width, K, stride_we, stride_wn, 1,
            EVEN_K, False, DESCRIPTOR, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        up = dot(w, x, up)
    rows_n = first_n + tl.arange(0, BLOCK_N)
    store_activation(
        a_ptr, pre_ptr, gate, up, bias_ptr, expert, rows_m, end, rows_n, width,
        ACTIVATION, KEEP, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def moe_combine_kernel(
    y_ptr,
    rows_ptr,
    row_of_slot_ptr,
    slots_ptr,
    weights_ptr,
    base_ptr,
    n_rows,
    N,
    PER_TOKEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[t] = sum over the token's slots that have a row, in slot order, then base; rounded once."""
    token = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(PER_TOKEN):
        slot = token * PER_TOKEN + j
        row, live = row_of_slot(row_of_slot_ptr, slots_ptr, slot, n_rows)
        value = tl.load(rows_ptr + row * N + cols, mask=mask & live, other=0.0)
        if WEIGHTED:
            value *= tl.load(weights_ptr + slot, mask=live, other=0.0)
        acc += value
    if HAS_BASE:
        base = base_ptr + token.to(tl.int64) * N + cols
        acc += tl.load(base, mask=mask, other=0.0).to(tl.float32)
    out = y_ptr + token.to(tl.int64) * N + cols
    tl.store(out, cast(acc, y_ptr.dtype.element_ty), mask=mask)


def combine(
    rows: Tensor,
    planned: Plan,
    n_tokens: int,
    weights: Tensor | None,
    base: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y[T, N]: the sum of a token's rows of f32 [T * k, N], times weights f32 [T, k], plus base.

    Products are rounded, then added in slot order; base[T, N] (any float) last.
    """
    n_rows, n = rows.shape
    y = torch.empty((n_tokens, n), dtype=out_dtype, device=rows.device)
    if y.numel() == 0:
        return y
    block = min(triton.next_power_of_2(n), moe_tuning.COMBINE_BLOCK)
    moe_combine_kernel[(n_tokens, triton.cdiv(n, block))](
        y,
        rows,
        planned.row_of_slot,
        planned.slots,
        rows if weights is None else weights,
        rows if base is None else base,
        n_rows,
        n,
        PER_TOKEN=n_rows // n_tokens,
        WEIGHTED=weights is not None,
        HAS_BASE=base is not None,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return y


def gate_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Plan,
    tile: ProductTile,
    activation: str,
    keep: bool,
    descriptor: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(a [P, I], pre [P, 2I] or [0, 2I]) in x's dtype: the first product and the activation."""
    width, k, n_slots = weight.shape[1] // 2, x.shape[1], rows.slots.shape[0]
    a = torch.empty((n_slots, width), dtype=x.dtype, device=x.device)
    pre = torch.empty((n_slots if keep else 0, 2 * width), dtype=x.dtype, device=x.device)
    if a.numel() == 0 or rows.n_tiles == 0:
        return a, pre
    if descriptor is None:
        descriptor = moe_tuning.use_descriptors(weight)
    moe_gate_up_kernel[(rows.n_tiles * triton.cdiv(width, tile.n),)](
        a,
        pre if keep else a,
        x,
        weight_argument(weight, tile.n, tile.k, descriptor, False),
        x if bias is None else bias,
        rows.tiles,
        rows.slots,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        rows.n_tiles,
        n_slots,
        n_slots // x.shape[0],
        width,
        k,
        ACTIVATION=activation,
        KEEP=keep,
        HAS_BIAS=bias is not None,
        EVEN_K=k % tile.k == 0,
        DESCRIPTOR=descriptor,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return a, pre


def contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    """The tensors, contiguous, as the kernels index them."""
    return (None if t is None else t.contiguous() for t in tensors)


def moe(
    x: Tensor,
    gate_up_weight: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    offsets: Tensor,
    slots: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    base: Tensor | None,
    activation: str,
    keep: bool,
    out_dtype: torch.dtype | None = None,
    *,
    descriptor: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [T, H] in `out_dtype` (default: x's), pre [T * k, 2I] in sorted order, or [0, 2I]).

    x[T, H], gate_up_weight[E, 2I, H], down[E, H, I]: all f32 or all bf16; topk_weights
    f32 [T, k]; offsets int32 [E + 1] and slots int32 [T * k] as `moe_dispatch` gives them; biases
    [E, 2I], [E, H] and base [T, H]: any float. Rows of pre of no expert are not written.
    """
    x, gate_up_weight, down = dense_rows(x), dense_rows(gate_up_weight), dense_rows(down)
    gate_up_bias, down_bias, base = contiguous(gate_up_bias, down_bias, base)
    experts, n_slots = gate_up_weight.shape[0], slots.shape[0]
    mean = moe_tuning.mean_rows(n_slots, experts)
    first = moe_tuning.gate_up_tile(mean, x.dtype, x.device)
    second = moe_tuning.product_tile(mean, x.dtype, x.device)
    rows = plan(offsets, slots, n_slots, first.m, tail=False)
    a, pre = gate_up(x, gate_up_weight, gate_up_bias, rows, first, activation, keep, descriptor)
    o = grouped_product(
        a, down, down_bias, torch.float32, replanned(rows, offsets, second.m), second,
        descriptor=descriptor,
    )  # fmt: skip
    y = combine(o, rows, x.shape[0], topk_weights.contiguous(), base, out_dtype or x.dtype)
    return y, pre
