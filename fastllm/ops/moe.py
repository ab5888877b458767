"""The experts of a sparse feed-forward layer in one op: two grouped products, weighted sum.

For slot s = t * k + j of token t and its expert e, with compute dtype c, that of x:

    pre = round_c(x[t] @ gate_up[e].T + gate_up_bias[e])      fp32 sums in the K order of `linear`
    a   = round_c(act(pre[:I], pre[I:]))                       in fp32, see `gated_activation`
    o   = a @ down[e].T + down_bias[e]                         fp32, not rounded
    y   = round(sum over j of topk_weights[t, j] * o + base)   products rounded to fp32, then added
                                                               in slot order from 0; base is last

A token's bits depend neither on other tokens nor on sorting, threads, or whether the weights are
packed. The backward keeps neither a nor o (Guo et al., SonicMoE, arXiv 2512.14080): the gradient of
the routing weights is taken where the gradient of a is made.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .checks import check_devices, values_readable
from .expert_layout import laid_out, native_layout, split_pairs
from .gated_activation import ACTIVATIONS, check_activation, gated_activation
from .grouped_matmul import expert_ranges
from .linear import contiguous_rows
from .moe_backward import moe_backward
from .moe_dispatch import check_choices, check_dispatch, sort_choices
from .pages import large_empty
from .registry import Op, gradient_dtype

_BIAS_DTYPES = (torch.float32, torch.bfloat16)


def moe_ref(
    x: Tensor,
    gate_up: Tensor,
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
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `moe`: (y `[T, H]`, pre `[T * k, 2 I]` sorted, or `[0, 2 I]`)."""
    k = topk_weights.shape[1]
    pre = x.new_zeros(slots.shape[0], gate_up.shape[1])
    rows = x.new_zeros((slots.shape[0], down.shape[1]), dtype=torch.float32)
    served = torch.zeros_like(slots, dtype=torch.bool)
    for e, at in expert_ranges(offsets, slots.shape[0]):
        slot = slots[at].long()
        h = _product(x[slot // k], gate_up[e], gate_up_bias, e).to(x.dtype)
        h = split_pairs(h) if interleaved else h
        pre[at] = h.detach()
        rows[slot] = _product(activated(h, activation), down[e], down_bias, e)
        served[slot] = True
    y = combine_ref(rows, served, topk_weights, base).to(out_dtype or x.dtype)
    return y, pre if keep else pre[:0]


def activated(pre: Tensor, activation: str) -> Tensor:
    """a `[R, I]` of pre `[R, 2 I]`, in fp32 and rounded once."""
    gate, up = pre.float().chunk(2, dim=-1)
    return gated_activation(gate, up, activation).to(pre.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, e: int) -> Tensor:
    sums = x.float() @ weight.float().T
    return sums if bias is None else sums + bias[e].float()


def combine_ref(rows: Tensor, served: Tensor, weights: Tensor, base: Tensor | None) -> Tensor:
    """float32 `[T, H]`: the weighted rows `[T * k, H]` of the served slots, added up in order."""
    tokens, k = weights.shape
    slot_rows, used = rows.view(tokens, k, rows.shape[-1]), served.view(tokens, k, 1)
    y = torch.zeros((tokens, rows.shape[-1]), dtype=torch.float32, device=rows.device)
    for j in range(k):
        y = y + torch.where(used[:, j], weights[:, j, None].float() * slot_rows[:, j], 0.0)
    return y if base is None else y + base.float()


def _fake(
    x: Tensor,
    gate_up: Tensor,
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
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], down.shape[1]), dtype=out_dtype or x.dtype)
    return y, x.new_empty((slots.shape[0] if keep else 0, gate_up.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    (
        x,
        gate_up,
        down,
        weights,
        offsets,
        slots,
        b1,
        b2,
        base,
        activation,
        keep,
        _,
        ctx.interleaved,
    ) = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate_up, down, weights, offsets, slots, output[1], b1, b2)
    ctx.activation, ctx.keep = activation, keep
    ctx.base_dtype = None if base is None else base.dtype
    ctx.weight_gradients = gradient_dtype(gate_up), gradient_dtype(down)


def _grads(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 13
    needs = ctx.needs_input_grad
    dbase = dy.to(ctx.base_dtype) if ctx.base_dtype is not None and needs[8] else None
    wanted = [needs[i] for i in (0, 1, 2, 3, 6, 7)]
    grads: tuple[Any, ...] = (None,) * 6
    if any(wanted):
        if not ctx.keep:
            raise RuntimeError("moe was called with keep=False: its gradients need keep=True")
        x, gate_up, down, weights, offsets, slots, pre, b1, b2 = ctx.saved_tensors
        of_gate_up, of_down = ctx.weight_gradients
        found = moe_backward(
            dy, x, gate_up, down, weights, offsets, slots, pre, b1, b2,
            ctx.activation, wanted, of_gate_up, of_down, ctx.interleaved,
        )  # fmt: skip
        grads = tuple(g if want else None for g, want in zip(found, wanted, strict=True))
    dx, dgate_up, ddown, dweights, db1, db2 = grads
    return dx, dgate_up, ddown, dweights, None, None, db1, db2, dbase, *[None] * 4


def _variant(*args: Any) -> str:
    return str(args[9])


_moe = Op(
    "moe(Tensor x, Tensor gate_up, Tensor down, Tensor topk_weights, Tensor offsets, Tensor slots,"
    " Tensor? gate_up_bias, Tensor? down_bias, Tensor? base, str activation, bool keep,"
    " ScalarType? out_dtype=None, bool interleaved=False) -> (Tensor, Tensor)",
    moe_ref,
    fake=_fake,
    backward=_grads,
    setup_context=_save,
    variant=_variant,
)


def _native_layout(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slots: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, base: Tensor | None,
    activation: str, keep: bool, out_dtype: torch.dtype | None = None, interleaved: bool = False,
) -> bool:  # fmt: skip
    whole = (weights, offsets, slots, gate_up_bias, down_bias)
    return (
        all(t.stride(-1) == 1 for t in (x, base) if t is not None)
        and native_layout(gate_up, interleaved)
        and native_layout(down)
        and all(t.is_contiguous() for t in whole if t is not None)
    )


@_moe.impl("native", "cpu", variants=ACTIVATIONS, when=_native_layout)
def _moe_cpu(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_weights: Tensor, offsets: Tensor, slots: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, base: Tensor | None,
    activation: str, keep: bool, out_dtype: torch.dtype | None = None, interleaved: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if interleaved and gate_up_bias is not None:
        gate_up_bias = split_pairs(gate_up_bias)
    y = x.new_empty((x.shape[0], down.shape[1]), dtype=out_dtype)
    pre = x.new_empty((slots.shape[0] if keep else 0, gate_up.shape[1]))
    size = _C.moe_scratch(x.shape[0], x.shape[1], slots.shape[0], down.shape[2])
    scratch = large_empty((size,), torch.uint8, "cpu")
    _C.moe(
        y, pre, x, gate_up, down, topk_weights, offsets, slots, gate_up_bias, down_bias, base,
        ACTIVATIONS.index(activation), interleaved, scratch,
    )  # fmt: skip
    return y, pre


def _in_halves(*args: Any) -> bool:
    return not any(args[12:])  # `moe` puts what is in turns into halves for GPUs


@_moe.impl("triton", "cuda", variants=ACTIVATIONS, when=_in_halves)
def _moe_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import moe as kernel

    return kernel.moe(*args[:12])


def moe(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    base: Tensor | None = None,
    activation: str = "silu",
    first_expert: int | None = None,
    dispatch: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    interleaved: bool = False,
    allow_nan: bool = False,
) -> Tensor:
    """The weighted sum of each token's experts; no capacity, no token dropped; differentiable.

    Kept for the backward: x, topk_weights, the sorting (4 k + 4 (E + 1) / T bytes a token) and
    `pre` (2 I k values of the dtype of x a token); nothing of the size of the experts' outputs.

    Args:
        x: `[T, H]`, float32 or bfloat16.
        gate_up: `[E, 2 I, H]`, the dtype of `x`: I rows of the gate, then I of the value. A
            transposed view of `[E, H, 2 I]` is read where it lies on the CPU (and copied on GPUs),
            with the same bits; its gradient lies as it does. The same holds for `down`.
        down: `[E, H, I]`, the dtype of `x`.
        topk_ids: int32 `[T, k]`, the experts of each token; -1: none.
        topk_weights: float32 `[T, k]`.
        gate_up_bias: `[E, 2 I]`, float32 or bfloat16.
        down_bias: `[E, H]`, float32 or bfloat16.
        base: `[T, H]`, float32 or the dtype of `x`, added last before the one rounding: shared
            experts, or a residual.
        activation: "silu", "gelu", "gelu_tanh" or "swiglu_oai", see `fastllm.ops.gated_activation`.
        first_expert: the id of the first expert of a rank's slice, whose sum then holds the
            contributions of these experts alone; None: all experts are here.
        dispatch: what `moe_dispatch` gave for `topk_ids`, where it is known already.
        out_dtype: float32 or bfloat16; default that of `x`.
        interleaved: rows of `gate_up`, and values of its bias, alternate: gate, value, gate, value.
            On the CPU it is read where it lies if it is a transposed view, else copied.
        allow_nan: NaN or infinite `topk_weights` give such outputs; else they are an error on the
            CPU.

    Returns:
        Contiguous `[T, H]`.

    Raises:
        ValueError: on shapes, dtypes or (on the CPU) values that do not fit, naming the argument.
    """
    _check_weights(x, gate_up, down)
    check_moe(
        x, gate_up.shape[0], down.shape[2], topk_ids, topk_weights, gate_up_bias, down_bias, base,
        activation, first_expert, dispatch, out_dtype, allow_nan,
    )  # fmt: skip
    offsets, slots = dispatch or sort_choices(topk_ids, gate_up.shape[0], first_expert)
    gate_up, down = laid_out(gate_up, interleaved), laid_out(down)
    if interleaved and x.device.type != "cpu":
        gate_up_bias = None if gate_up_bias is None else split_pairs(gate_up_bias)
        interleaved = False
    x = contiguous_rows(x)
    base = None if base is None else contiguous_rows(base)
    gate_up_bias, down_bias = (
        None if t is None else t.contiguous() for t in (gate_up_bias, down_bias)
    )
    learned = (x, gate_up, down, topk_weights, gate_up_bias, down_bias)
    y, _ = _moe(
        x, gate_up, down, topk_weights.contiguous(), offsets, slots, gate_up_bias, down_bias, base,
        activation, records_gradient(learned), out_dtype, interleaved,
    )  # fmt: skip
    return y


def records_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd is on and one of the tensors wants a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_weights(x: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() != 2:
        raise ValueError(
            f"x must be float32 or bfloat16 of shape [T, H], got {x.dtype} of {tuple(x.shape)}"
        )
    width = x.shape[1]
    if gate_up.dim() != 3 or gate_up.shape[2] != width or gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up must have shape [E, 2 I, {width}] (the columns of x), "
            f"got {tuple(gate_up.shape)}"
        )
    expected = (gate_up.shape[0], width, gate_up.shape[1] // 2)
    if tuple(down.shape) != expected:
        raise ValueError(f"down must have shape {expected}, got {tuple(down.shape)}")
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} is {weight.dtype} and x is {x.dtype}: they must be the same")
    check_devices(x, gate_up=gate_up, down=down)


def check_moe(
    x: Tensor,
    experts: int,
    inner: int,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    base: Tensor | None,
    activation: str,
    first_expert: int | None,
    dispatch: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype | None,
    allow_nan: bool = False,
) -> None:
    """Raise ValueError unless everything but the weights fits x `[T, H]` and the experts."""
    tokens, width = x.shape
    check_activation(activation)
    check_choices(topk_ids, experts, first_expert)
    if topk_weights.dtype != torch.float32 or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must be float32 of shape {tuple(topk_ids.shape)} like topk_ids, "
            f"got {topk_weights.dtype} of {tuple(topk_weights.shape)}"
        )
    if topk_ids.shape[0] != tokens:
        raise ValueError(f"topk_ids has {topk_ids.shape[0]} rows, x has {tokens}")
    _check_bias("gate_up_bias", gate_up_bias, experts, 2 * inner)
    _check_bias("down_bias", down_bias, experts, width)
    if base is not None and (base.shape != x.shape or base.dtype not in (torch.float32, x.dtype)):
        raise ValueError(
            f"base must be float32 or {x.dtype} of shape {tuple(x.shape)}, "
            f"got {base.dtype} of {tuple(base.shape)}"
        )
    if out_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"out_dtype must be torch.float32 or torch.bfloat16, got {out_dtype}")
    check_devices(
        x, topk_ids=topk_ids, topk_weights=topk_weights, gate_up_bias=gate_up_bias,
        down_bias=down_bias, base=base,
    )  # fmt: skip
    if not allow_nan and values_readable(topk_weights):
        if not math.isfinite(float(topk_weights.detach().sum())):
            raise ValueError("topk_weights holds NaN or infinite values")
    if dispatch is not None:
        check_dispatch(*dispatch, experts, topk_ids.numel())


def _check_bias(name: str, bias: Tensor | None, experts: int, size: int) -> None:
    if bias is None:
        return
    if tuple(bias.shape) != (experts, size) or bias.dtype not in _BIAS_DTYPES:
        raise ValueError(
            f"{name} must be float32 or bfloat16 of shape [{experts}, {size}], "
            f"got {bias.dtype} of {tuple(bias.shape)}"
        )
