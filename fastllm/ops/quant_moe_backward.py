"""The gradients of `quant_moe`, by x and by the gate weights: the packed experts are frozen.

Definitions are those of `moe_backward`, with weights rounded to the dtype of pre as a stored copy
of them would be. Experts are dequantized strip by strip on the way; there is never a whole copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .gated_activation import ACTIVATIONS
from .grouped_matmul import expert_ranges
from .linear import contiguous_rows
from .moe_backward import expert_rows, slot_sums
from .pages import large_empty
from .registry import Op


def variant_name(gate_up_format: str, down_format: str) -> str:
    """The row of the backend table: the formats of both weights."""
    return gate_up_format if gate_up_format == down_format else f"{gate_up_format}+{down_format}"


def variants(formats: Sequence[str]) -> tuple[str, ...]:
    """The variants of all pairs of these formats."""
    return tuple(variant_name(first, second) for first in formats for second in formats)


def quant_moe_backward_ref(
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
    """Plain PyTorch definition of `quant_moe_backward`."""
    dtype, (t, k) = pre.dtype, topk_weights.shape
    hidden, inner = dy.shape[1], pre.shape[1] // 2

    def rows_of_expert(e: int, data: Tensor, scales: Tensor, format: str, n: int, k: int) -> Tensor:
        return layout.dequantize(data[e], scales[e], format, n, k).to(dtype).float()

    g = dy.to(dtype).float()
    dx_slots, dw = g.new_zeros((t * k, hidden)), g.new_zeros(t * k)
    for e, rows in expert_ranges(offsets, slots.shape[0]):
        w2 = rows_of_expert(e, down, down_scales, down_format, hidden, inner)
        w1 = rows_of_expert(e, gate_up, gate_up_scales, gate_up_format, 2 * inner, hidden)
        r = expert_rows(g, w2, topk_weights, slots, pre, rows, activation)
        dw[r.slots] = (r.da * r.a).sum(-1)
        if down_bias is not None:
            dw[r.slots] += r.g @ down_bias[e].float()
        dx_slots[r.slots] = r.dpre @ w1
    dx = slot_sums(dx_slots.view(t, k, hidden), dtype)
    return dx if wanted[0] else dx.new_empty(0), dw.view(t, k) if wanted[1] else dw.new_empty(0)


def _fake(
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
    dx = dy.new_empty(dy.shape if wanted[0] else (0,), dtype=pre.dtype)
    dw = dy.new_empty(topk_weights.shape if wanted[1] else (0,), dtype=torch.float32)
    return dx, dw


def _variant(*args: Any) -> str:
    return variant_name(args[3], args[6])


_quant_moe_backward = Op(
    "quant_moe_backward(Tensor dy, Tensor gate_up, Tensor gate_up_scales, str gate_up_format, "
    "Tensor down, Tensor down_scales, str down_format, Tensor topk_weights, Tensor offsets, "
    "Tensor slots, Tensor pre, Tensor? down_bias, str activation, bool[] wanted) "
    "-> (Tensor, Tensor)",
    quant_moe_backward_ref,
    fake=_fake,
    variant=_variant,
)


def _rows_per_group(gate_up: Tensor, format: str, down: Tensor, down_format: str) -> set[int]:
    pairs = (gate_up, format), (down, down_format)
    return {layout.rows_of_experts(data, name) for data, name in pairs}


def _native_layout(
    dy: Tensor, gate_up: Tensor, _: Tensor, format: str, down: Tensor, __: Tensor, other: str,
    *rest: Any,
) -> bool:  # fmt: skip
    return _rows_per_group(gate_up, format, down, other) == {layout.ROWS_PER_GROUP["cpu"]}


@_quant_moe_backward.impl("native", "cpu", variants=variants(layout.FORMATS), when=_native_layout)
def _quant_moe_backward_cpu(
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
    dx, dw = _fake(
        dy, gate_up, gate_up_scales, gate_up_format, down, down_scales, down_format,
        topk_weights, offsets, slots, pre, down_bias, activation, wanted,
    )  # fmt: skip
    rows = min(max(int(offsets[-1]), 0), slots.shape[0])
    _C.quant_moe_backward(
        dx if wanted[0] else None,
        dw if wanted[1] else None,
        contiguous_rows(dy.to(pre.dtype)),
        gate_up,
        gate_up_scales,
        layout.FORMATS.index(gate_up_format),
        down,
        down_scales,
        layout.FORMATS.index(down_format),
        topk_weights.contiguous(),
        offsets,
        slots,
        pre,
        down_bias,
        large_empty((rows, pre.shape[1]), pre.dtype, "cpu"),  # dpre
        large_empty((rows, dy.shape[1]), torch.float32, "cpu") if wanted[0] else None,
        slots.new_empty(slots.shape) if wanted[0] else None,  # rows of slots
        ACTIVATIONS.index(activation),
    )
    return dx, dw


def _one_row_per_group(
    dy: Tensor, gate_up: Tensor, _: Tensor, format: str, down: Tensor, __: Tensor, other: str,
    *rest: Any,
) -> bool:  # fmt: skip
    return _rows_per_group(gate_up, format, down, other) == {1}


@_quant_moe_backward.impl(
    "triton",
    "cuda",
    variants=variants(layout.FORMATS),
    when=_one_row_per_group,
)
def _quant_moe_backward_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import quant_moe_backward as kernel

    return kernel.quant_moe_backward(*args)


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
    """Gradients of `quant_moe`, whose arguments the caller has checked.

    Args:
        dy: `[T, H]`, float32 or bfloat16; rounded to the dtype of pre.
        gate_up, gate_up_scales, gate_up_format: packed experts of 2 I rows of H columns.
        down, down_scales, down_format: packed experts of H rows of I columns.
        topk_weights: float32 `[T, k]`.
        offsets: int32 `[E + 1]`: expert e owns the rows offsets[e] to offsets[e + 1].
        slots: int32 `[T k]`: the slot of each row; rows past offsets[E] are not read.
        pre: `[T k, 2 I]`, float32 or bfloat16: what the activation got, in rows' order.
        down_bias: `[E, H]`, float32 or bfloat16, or None.
        activation: one of `gated_activation.ACTIVATIONS`.
        wanted: whether the gradients of x and of topk_weights are made; else empty tensors `[0]`.

    Returns:
        Gradients of x (the dtype of pre) and of topk_weights (float32). Slots without a row get 0.
    """
    return _quant_moe_backward(
        dy, gate_up, gate_up_scales, gate_up_format, down, down_scales, down_format,
        topk_weights, offsets, slots, pre, down_bias, activation, wanted,
    )  # fmt: skip
