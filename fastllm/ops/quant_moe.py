"""`moe` with experts that stay packed: the products are `quant_matmul`'s, the rest is `moe`'s.

In mode "int8" x is quantized once a token and the activations once a slot, by the quantizer of
`quant_matmul`. A quantized weight is frozen: gradients reach x, topk_weights and base. Packs of all
experts are `[E, *layout.data_shape(...)]`, see `packed_layout`; each expert fills whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .checks import check_devices
from .gated_activation import ACTIVATIONS
from .grouped_matmul import expert_ranges
from .linear import contiguous_rows
from .moe import activated, check_moe, combine_ref, records_gradient
from .moe_dispatch import sort_choices
from .pages import large_empty
from .quant_format import QUANT_FORMATS
from .quant_matmul import check_mode, quant_matmul_ref
from .quant_moe_backward import quant_moe_backward
from .registry import Op

MODES = ("int8", "bf16", "fp32")  # of a model: e4m3 codes have "fp8" where others have "int8"
Packed = tuple[Tensor, Tensor, str]  # data and scales of all experts, format


def variant_name(gate_up_format: str, down_format: str, mode: str) -> str:
    """The row of the backend table: formats, and the mode where one of them is quantized."""
    formats = gate_up_format
    if gate_up_format != down_format:
        formats = f"{gate_up_format}+{down_format}"
    dense = gate_up_format in layout.DENSE and down_format in layout.DENSE
    return formats if dense else f"{formats}/{mode}"


def variants(formats: Sequence[str]) -> tuple[str, ...]:
    """The variants of all pairs of these formats that rows of one dtype can meet."""
    pairs = [(a, b) for a in formats for b in formats if {a, b} != {"bf16", "f32"}]
    return tuple(dict.fromkeys(variant_name(a, b, mode) for a, b in pairs for mode in MODES))


VARIANTS = variants(layout.FORMATS)


def quant_moe_ref(
    x: Tensor, gate_up_data: Tensor, gate_up_scales: Tensor, gate_up_format: str,
    down_data: Tensor, down_scales: Tensor, down_format: str, inner: int,
    topk_weights: Tensor, offsets: Tensor, slots: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, base: Tensor | None,
    activation: str, mode: str, keep: bool, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch definition of `quant_moe`: (y `[T, H]`, pre `[T * k, 2 I]` or `[0, 2 I]`)."""
    k = topk_weights.shape[1]
    pre = x.new_zeros(slots.shape[0], 2 * inner)
    rows = x.new_zeros((slots.shape[0], x.shape[1]), dtype=torch.float32)
    served = torch.zeros_like(slots, dtype=torch.bool)
    for e, at in expert_ranges(offsets, slots.shape[0]):
        slot = slots[at].long()
        b1 = None if gate_up_bias is None else gate_up_bias[e]
        b2 = None if down_bias is None else down_bias[e]
        first, second = (QUANT_FORMATS[f].mode(mode) for f in (gate_up_format, down_format))
        pre[at] = quant_matmul_ref(
            x[slot // k], gate_up_data[e], gate_up_scales[e], gate_up_format, 2 * inner, b1, first
        )
        a = activated(pre[at], activation)
        rows[slot] = quant_matmul_ref(
            a, down_data[e], down_scales[e], down_format, x.shape[1], b2, second, torch.float32
        )
        served[slot] = True
    y = combine_ref(rows, served, topk_weights, base).to(out_dtype or x.dtype)
    return y, pre if keep else pre[:0]


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    inner, slots, keep = rest[6], rest[9], rest[15]
    out_dtype = rest[16] if len(rest) > 16 else None
    pre = x.new_empty((slots.shape[0] if keep else 0, 2 * inner))
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype), pre


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, d1, s1, f1, d2, s2, f2, _, weights, offsets, slots, _, b2, base = inputs[:14]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d1, s1, d2, s2, weights, offsets, slots, output[1], b2)
    ctx.formats, ctx.activation, ctx.keep = (f1, f2), inputs[14], inputs[16]
    ctx.base_dtype = None if base is None else base.dtype


def _grads(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    grads: list[Any] = [None] * 18
    if dy is None:
        return tuple(grads)
    if ctx.base_dtype is not None and ctx.needs_input_grad[13]:
        grads[13] = dy.to(ctx.base_dtype)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[8]]
    if any(wanted):
        if not ctx.keep:
            raise RuntimeError("quant_moe was called with keep=False: its gradients need keep=True")
        d1, s1, d2, s2, weights, offsets, slots, pre, b2 = ctx.saved_tensors
        dx, dweights = quant_moe_backward(
            dy.to(pre.dtype), d1, s1, ctx.formats[0], d2, s2, ctx.formats[1],
            weights, offsets, slots, pre, b2, ctx.activation, wanted,
        )  # fmt: skip
        grads[0], grads[8] = dx if wanted[0] else None, dweights if wanted[1] else None
    return tuple(grads)


def _variant(*args: Any) -> str:
    return variant_name(args[3], args[6], args[15])


_quant_moe = Op(
    "quant_moe(Tensor x, Tensor gate_up_data, Tensor gate_up_scales, str gate_up_format,"
    " Tensor down_data, Tensor down_scales, str down_format, int inner, Tensor topk_weights,"
    " Tensor offsets, Tensor slots, Tensor? gate_up_bias, Tensor? down_bias, Tensor? base,"
    " str activation, str mode, bool keep, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
    quant_moe_ref,
    fake=_fake,
    backward=_grads,
    setup_context=_save,
    variant=_variant,
)


def _native_layout(x: Tensor, d1: Tensor, _: Any, f1: str, d2: Tensor, *rest: Any) -> bool:
    f2, weights, offsets, slots, b1, b2, base = rest[1], *rest[3:9]
    whole = (weights, offsets, slots, b1, b2)
    return (
        all(
            layout.rows_of_experts(d, f) == layout.ROWS_PER_GROUP["cpu"]
            for d, f in ((d1, f1), (d2, f2))
        )
        and all(t.stride(-1) == 1 for t in (x, base) if t is not None)
        and all(t.is_contiguous() for t in whole if t is not None)
    )


@_quant_moe.impl("native", "cpu", variants=VARIANTS, when=_native_layout)
def _quant_moe_cpu(
    x: Tensor, gate_up_data: Tensor, gate_up_scales: Tensor, gate_up_format: str,
    down_data: Tensor, down_scales: Tensor, down_format: str, inner: int,
    topk_weights: Tensor, offsets: Tensor, slots: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, base: Tensor | None,
    activation: str, mode: str, keep: bool, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape, dtype=out_dtype)
    pre = x.new_empty((slots.shape[0] if keep else 0, 2 * inner))
    scratch = large_empty(
        (_C.moe_scratch(x.shape[0], x.shape[1], slots.shape[0], inner),), torch.uint8, "cpu"
    )
    _C.quant_moe(
        y, pre, x, gate_up_data, gate_up_scales, layout.FORMATS.index(gate_up_format),
        down_data, down_scales, layout.FORMATS.index(down_format), inner, topk_weights, offsets,
        slots, gate_up_bias, down_bias, base, ACTIVATIONS.index(activation), MODES.index(mode),
        scratch,
    )  # fmt: skip
    return y, pre


def _one_row_per_group(x: Tensor, d1: Tensor, _: Any, f1: str, d2: Tensor, *rest: Any) -> bool:
    return layout.rows_of_experts(d1, f1) == 1 and layout.rows_of_experts(d2, rest[1]) == 1


@_quant_moe.impl("triton", "cuda", variants=VARIANTS, when=_one_row_per_group)
def _quant_moe_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import quant_moe as kernel

    return kernel.quant_moe(*args)


def quant_moe(
    x: Tensor,
    gate_up: Packed,
    down: Packed,
    inner: int,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    base: Tensor | None = None,
    activation: str = "silu",
    mode: str = "int8",
    first_expert: int | None = None,
    dispatch: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`moe` with packed experts; differentiable in x, topk_weights and base.

    Args:
        x: `[T, H]`, float32 or bfloat16.
        gate_up: (data, scales, format) of `[E, 2 I, H]`, the parts of a `PackedExperts`.
        down: (data, scales, format) of `[E, H, I]`; the format may be another one.
        inner: I.
        topk_ids: see `moe`, as all the rest.
        topk_weights: see `moe`.
        gate_up_bias: see `moe`.
        down_bias: see `moe`.
        base: see `moe`.
        activation: see `moe`.
        mode: how rows meet quantized weights, see `quant_matmul`: "int8", "bf16" (x must be
            bfloat16) or "fp32" (x must be float32). fp8 formats have "fp8" in place of "int8",
            dense ones need x in their own dtype.
        first_expert: see `moe`.
        dispatch: see `moe`.
        out_dtype: see `moe`.

    Returns:
        Contiguous `[T, H]`.

    Raises:
        ValueError: on mismatched shapes, dtypes, names or values, naming the argument.
    """
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() != 2:
        raise ValueError(
            f"x must be float32 or bfloat16 of shape [T, H], got {x.dtype} of {tuple(x.shape)}"
        )
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    _check_pack("gate_up", gate_up, 2 * inner, x.shape[1], x.dtype, mode)
    _check_pack("down", down, x.shape[1], inner, x.dtype, mode)
    check_devices(x, gate_up=gate_up[0], down=down[0])
    experts = gate_up[0].shape[0]
    if down[0].shape[0] != experts:
        raise ValueError(f"down holds {down[0].shape[0]} experts, gate_up {experts}")
    check_moe(
        x, experts, inner, topk_ids, topk_weights, gate_up_bias, down_bias, base, activation,
        first_expert, dispatch, out_dtype,
    )  # fmt: skip
    offsets, slots = dispatch or sort_choices(topk_ids, experts, first_expert)
    base = None if base is None else contiguous_rows(base)
    gate_up_bias, down_bias = (
        None if t is None else t.contiguous() for t in (gate_up_bias, down_bias)
    )
    y, _ = _quant_moe(
        contiguous_rows(x), *gate_up, *down, inner, topk_weights.contiguous(), offsets, slots,
        gate_up_bias, down_bias, base, activation, mode, records_gradient((x, topk_weights)),
        out_dtype,
    )  # fmt: skip
    return y


def _check_pack(name: str, pack: Packed, n: int, k: int, x_dtype: torch.dtype, mode: str) -> None:
    data, scales, format = pack
    layout.check_format(format)
    check_mode(format, QUANT_FORMATS[format].mode(mode), x_dtype, f"mode of {name}")
    if data.dim() < 1 or scales.dim() < 1 or data.shape[0] != scales.shape[0]:
        raise ValueError(
            f"{name}: data and scales must have a first dimension of experts, "
            f"got {tuple(data.shape)} and {tuple(scales.shape)}"
        )
    if not data.is_contiguous() or not scales.is_contiguous():
        raise ValueError(f"{name}: data and scales must be contiguous")
    if not data.shape[0]:
        return
    try:
        layout.check_packed(data[0], scales[0], format, n, k)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
