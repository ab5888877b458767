"""The gradients of `moe` from what its forward keeps: x, the gate weights and `pre`.

Of slot s = t k + j (row p in the order sorted by expert e), with g = dy[t] rounded to the dtype of
x, and a = act(pre) computed again and rounded:

    da    = g @ down[e]                           fp32
    dw[s] = <da, a> + <g, down_bias[e]>           fp32: no output of an expert is needed
    dpre  = round(act'(pre) (w[s] da))
    ddown[e]    = sum over rows of g' round(w[s] a)      dgate_up[e] = sum over rows of dpre' x[t]
    dx[t] = round(sum over j, ascending, of fp32 dpre @ gate_up[e])

(the reformulation of SonicMoE, arXiv 2512.14080). Rows are summed in ascending order; nothing
depends on threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .expert_layout import empty_gradient, join_pairs, native_layout, room
from .gated_activation import ACTIVATIONS, gated_activation, gated_gradients
from .grouped_matmul import expert_ranges
from .linear import contiguous_rows
from .pages import large_empty
from .registry import Op

# x, gate_up, down, topk_weights, gate_up_bias, down_bias
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass
class ExpertRows:
    """What the rows of one expert need of the tokens, in fp32 unless said."""

    rows: slice
    slots: Tensor  # [r], int64
    tokens: Tensor  # [r], int64
    g: Tensor  # [r, H]
    w: Tensor  # [r, 1]
    a: Tensor  # [r, I], rounded to the dtype of pre
    da: Tensor  # [r, I]
    dpre: Tensor  # [r, 2 I], rounded to the dtype of pre


def expert_rows(
    g: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    slots: Tensor,
    pre: Tensor,
    rows: slice,
    activation: str,
) -> ExpertRows:
    """The first half of the backward for one expert: through `down` `[H, I]` (fp32) to dpre."""
    dtype = pre.dtype
    s = slots[rows].long()
    tokens = s // topk_weights.shape[1]
    w = topk_weights.reshape(-1)[s].unsqueeze(1)
    gate, up = pre[rows].float().chunk(2, -1)
    a = gated_activation(gate, up, activation).to(dtype).float()
    by_gate, by_up = gated_gradients(gate, up, activation)
    rows_g = g[tokens]
    da = rows_g @ down
    dpre = torch.cat((by_gate * (w * da), by_up * (w * da)), -1).to(dtype).float()
    return ExpertRows(rows, s, tokens, rows_g, w, a, da, dpre)


def slot_sums(dx_slots: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `[T, k, H]` summed over slots in their order, rounded once."""
    dx = torch.zeros_like(dx_slots[:, 0])
    for j in range(dx_slots.shape[1]):
        dx = dx + dx_slots[:, j]
    return dx.to(dtype)


def moe_backward_ref(
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
    interleaved: bool = False,
) -> Gradients:
    """Plain PyTorch definition of `moe_backward`."""
    dtype, (t, k) = x.dtype, topk_weights.shape
    g = dy.to(dtype).float()
    dx_slots, dw = g.new_zeros((t * k, x.shape[1])), g.new_zeros(t * k)
    dgate_up, ddown = g.new_zeros(gate_up.shape), g.new_zeros(down.shape)
    dgate_up_bias, ddown_bias = torch.zeros_like(dgate_up[..., 0]), torch.zeros_like(ddown[..., 0])
    for e, rows in expert_ranges(offsets, slots.shape[0]):
        r = expert_rows(g, down[e].float(), topk_weights, slots, pre, rows, activation)
        dpre = join_pairs(r.dpre) if interleaved else r.dpre
        dw[r.slots] = (r.da * r.a).sum(-1)
        if down_bias is not None:
            dw[r.slots] += r.g @ down_bias[e].float()
        dx_slots[r.slots] = dpre @ gate_up[e].float()
        ddown[e] = r.g.T @ (r.w * r.a).to(dtype).float()
        dgate_up[e] = dpre.T @ x[r.tokens].float()
        dgate_up_bias[e] = dpre.sum(0)
        ddown_bias[e] = (r.w * r.g).sum(0)
    dx = slot_sums(dx_slots.view(t, k, x.shape[1]), dtype)
    everything = (
        dx,
        dgate_up.to(gate_up_dtype),
        ddown.to(down_dtype),
        dw.view(t, k),
        dgate_up_bias,
        ddown_bias,
    )
    kept = [v if want else v.new_empty(0) for v, want in zip(everything, wanted, strict=True)]
    return kept[0], kept[1], kept[2], kept[3], kept[4], kept[5]


def _fake(
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
    interleaved: bool = False,
) -> Gradients:
    return _empty(x, gate_up, down, topk_weights, wanted, gate_up_dtype, down_dtype, interleaved)


def _empty(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    wanted: list[bool],
    gate_up_dtype: torch.dtype,
    down_dtype: torch.dtype,
    interleaved: bool,
) -> Gradients:
    """Memory for the gradients that are wanted, those of weights in the weights' own layout."""

    def some(shape: torch.Size, dtype: torch.dtype, want: bool) -> Tensor:
        return room(tuple(shape) if want else (0,), dtype, x)

    def weight(of: Tensor, dtype: torch.dtype, want: bool, pairs: bool = False) -> Tensor:
        return empty_gradient(of, dtype, pairs) if want else room((0,), dtype, x)

    return (
        some(x.shape, x.dtype, wanted[0]),
        weight(gate_up, gate_up_dtype, wanted[1], interleaved),
        weight(down, down_dtype, wanted[2]),
        some(topk_weights.shape, torch.float32, wanted[3]),
        some(gate_up.shape[:2], torch.float32, wanted[4]),
        some(down.shape[:2], torch.float32, wanted[5]),
    )


def _variant(*args: Any) -> str:
    return str(args[10])


_moe_backward = Op(
    "moe_backward(Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor topk_weights, "
    "Tensor offsets, Tensor slots, Tensor pre, Tensor? gate_up_bias, Tensor? down_bias, "
    "str activation, bool[] wanted, ScalarType gate_up_dtype, ScalarType down_dtype, "
    "bool interleaved=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_backward_ref,
    fake=_fake,
    variant=_variant,
)


def _native_layout(dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, *rest: Any) -> bool:
    interleaved = len(rest) > 10 and rest[10]
    return native_layout(gate_up, interleaved) and native_layout(down)


@_moe_backward.impl("native", "cpu", variants=ACTIVATIONS, when=_native_layout)
def _moe_backward_cpu(
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
    interleaved: bool = False,
) -> Gradients:
    found = _empty(x, gate_up, down, topk_weights, wanted, gate_up_dtype, down_dtype, interleaved)
    rows = min(max(int(offsets[-1]), 0), slots.shape[0])
    hidden, inner = down.shape[1:]
    _C.moe_backward(
        *(t if want else None for t, want in zip(found, wanted, strict=True)),
        contiguous_rows(dy.to(x.dtype)),
        contiguous_rows(x),
        gate_up,
        down,
        topk_weights.contiguous(),
        offsets,
        slots,
        pre,
        down_bias,
        large_empty((rows, 2 * inner), x.dtype, "cpu"),  # dpre
        large_empty((rows, inner), x.dtype, "cpu") if wanted[2] else None,  # w a
        large_empty((rows, hidden), torch.float32, "cpu") if wanted[0] else None,  # dx of slots
        slots.new_empty(slots.shape) if wanted[0] else None,  # rows of slots
        ACTIVATIONS.index(activation),
        interleaved,
    )
    return found


def _in_halves(*args: Any) -> bool:
    return not any(args[14:])  # `moe` puts what is in turns into halves for GPUs


@_moe_backward.impl("triton", "cuda", variants=ACTIVATIONS, when=_in_halves)
def _moe_backward_cuda(*args: Any) -> Gradients:
    from ..kernels import moe_backward as kernel

    return kernel.moe_backward(*args[:14])


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
    interleaved: bool = False,
) -> Gradients:
    """Gradients of `moe`, whose arguments the caller has checked.

    Args:
        dy: `[T, H]`, float32 or bfloat16; rounded to the dtype of x.
        x: `[T, H]`, float32 or bfloat16.
        gate_up: `[E, 2 I, H]`, the dtype of x.
        down: `[E, H, I]`, the dtype of x.
        topk_weights: float32 `[T, k]`.
        offsets: int32 `[E + 1]`: expert e owns the rows offsets[e] to offsets[e + 1].
        slots: int32 `[T k]`: the slot of each row; rows past offsets[E] are not read.
        pre: `[T k, 2 I]`, the dtype of x: what the activation got, in rows' order.
        gate_up_bias: `[E, 2 I]`, or None; not read.
        down_bias: `[E, H]`, float32 or bfloat16, or None.
        activation: one of `gated_activation.ACTIVATIONS`.
        wanted: which of the six results are made; the others are empty tensors `[0]`.
        gate_up_dtype, down_dtype: of the gradients of gate_up and down.
        interleaved: rows of gate_up alternate (see `moe`); `pre` holds gates, then values anyway.

    Returns:
        Gradients of x (its dtype), gate_up, down, topk_weights (float32), gate_up_bias and
        down_bias (float32). Slots without a row get the gradient 0.
    """
    return _moe_backward(
        dy, x, gate_up, down, topk_weights, offsets, slots, pre, gate_up_bias, down_bias,
        activation, wanted, gate_up_dtype, down_dtype, interleaved,
    )  # fmt: skip
