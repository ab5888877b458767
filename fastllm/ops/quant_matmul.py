"""y = x @ W.T + bias for a weight that stays packed; layouts are in `packed_layout`.

Per block of 32 columns either an exact int32 sum (activation "int8") or a dot of x with the
unscaled code ("bf16", "fp32"), then one fp32 FMA with the scale and one with the minimum, blocks in
ascending K: a dequantized weight is never rounded, and a row's bits depend on that row alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .linear import as_rows, check_output, linear_ref, prepared_rows
from .quant_matmul_input_grad import packed_input_grad
from .registry import Op, batch_invariant

ACTIVATIONS = ("int8", "bf16", "fp32")
VARIANTS = (*(f"{f}/{a}" for f in layout.QUANTIZED for a in ACTIVATIONS), *layout.DENSE)


def quantize_activation_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[M, K]` -> integers as float32 `[M, K/32, 32]` and their scale dx `[M, K/32]`.

    dx = amax / 127 and q = round-to-nearest-even(x * (127 / amax)) over every 32 columns. A block
    of zeros (or of values below 4e-37) gives 0; NaN or infinity makes its dx NaN or infinite.
    """
    blocks = x.float().unflatten(-1, (-1, layout.BLOCK))
    amax = blocks.abs().amax(-1)
    inverse = torch.full_like(amax, 127.0) / amax  # a number / tensor is rounded twice by torch
    inverse = torch.where(torch.isinf(inverse), 0.0, inverse)  # zeros, or too small a block
    return torch.round(blocks * inverse.unsqueeze(-1)), amax / 127.0


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    # The product of two floats is exact in float64, so this is an fp32 FMA (up to double rounding).
    return (a.double() * b.double() + c.double()).float()


def quant_matmul_ref(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch definition of `quant_matmul`."""
    if format in layout.DENSE:
        weight = layout.dense_rows(data, format, n, x.shape[-1])
        return linear_ref(x, weight, bias, out_dtype)
    x2 = as_rows(x)
    codes = layout.codes(data, format, n)
    d, m = layout.block_scales(scales, n)
    if activation == "int8":
        q, dx = quantize_activation_ref(x2)
        sums = q.sum(-1) * dx
    else:
        q, dx = x2.float().unflatten(-1, (-1, layout.BLOCK)), None
        sums = q.sum(-1)
    acc = torch.zeros(x2.shape[0], n, dtype=torch.float32, device=x.device)
    for b in range(codes.shape[1]):
        dot = q[:, b] @ codes[:, b].T  # exact for int8: below 2^24
        scale = d[:, b] if dx is None else d[:, b] * dx[:, b, None]
        acc = _fma(dot, scale, acc)
        if m is not None:
            acc = _fma(m[:, b], sums[:, b, None], acc)
    if bias is not None:
        acc = acc + bias.float()
    return acc.to(out_dtype or x.dtype).reshape(*x.shape[:-1], n)


def _quant_matmul_fake(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, data, scales, ctx.format, ctx.n, bias, _, _ = inputs
    ctx.save_for_backward(data, scales)
    ctx.x_dtype, ctx.k = x.dtype, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # The weight is frozen; rounding of int8 activations is passed straight through.
    data, scales = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = packed_input_grad(dy.to(ctx.x_dtype), data, scales, ctx.format, ctx.n, ctx.k)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        dbias = as_rows(dy.float()).sum(0).to(ctx.bias_dtype)
    return dx, None, None, None, None, dbias, None, None


def _variant(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Any,
    activation: str,
    *_: Any,
) -> str:
    return format if format in layout.DENSE else f"{format}/{activation}"


_quant_matmul = Op(
    "quant_matmul(Tensor x, Tensor data, Tensor scales, str format, int n, Tensor? bias, "
    "str activation, ScalarType? out_dtype=None) -> Tensor",
    quant_matmul_ref,
    fake=_quant_matmul_fake,
    backward=_backward,
    setup_context=_save,
    variant=_variant,
)


def _native_layout(x: Tensor, data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == layout.ROWS_PER_GROUP["cpu"] and x.stride(-1) == 1


@_quant_matmul.impl("native", "cpu", variants=VARIANTS, when=_native_layout)
def _quant_matmul_cpu(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    x2 = as_rows(x)
    y = torch.empty((x2.shape[0], n), dtype=out_dtype or x.dtype)
    _C.quant_matmul(
        y,
        x2,
        data,
        scales,
        layout.FORMATS.index(format),
        n,
        bias,
        ACTIVATIONS.index(activation),
        prepared_rows(x2),
    )
    return y.view(*x.shape[:-1], n)


def _one_row_per_group(x: Tensor, data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == 1


@_quant_matmul.impl("triton", "cuda", variants=VARIANTS, when=_one_row_per_group)
def _quant_matmul_cuda(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    from ..kernels import quant_matmul as kernel

    return kernel.quant_matmul(
        x, data, scales, format, n, bias, activation, out_dtype, batch_invariant=batch_invariant()
    )


def quant_matmul(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None = None,
    activation: str = "int8",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ W.T + bias` with a packed weight; differentiable in `x` and `bias`.

    Args:
        x: `[..., K]`, float32 or bfloat16.
        data: the packed codes or values, laid out as in `fastllm.ops.packed_layout`.
        scales: fp16 block scales; empty for the dense formats.
        format: "q4_0", "q4_1", "q8_0", "bf16" or "f32".
        n: output features N (the packed groups may hold more rows).
        bias: `[N]`, float32 or bfloat16, added in fp32.
        activation: "int8" (x is quantized per 32 columns), "bf16" (x must be bfloat16) or "fp32"
            (x must be float32). Dense formats need x in their own dtype instead.
        out_dtype: float32 or bfloat16; default that of `x`.

    Returns:
        Contiguous `[..., N]`.

    Raises:
        ValueError: on mismatched shapes, dtypes or names, naming the argument.
    """
    _check(x, data, scales, format, n, bias, activation, out_dtype)
    return _quant_matmul(x, data, scales, format, n, bias, activation, out_dtype)


def _check(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() < 1:
        raise ValueError(
            "x must be float32 or bfloat16 with at least one dimension, "
            f"got {x.dtype} of {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    layout.check_packed(data, scales, format, n, x.shape[-1])
    needed = layout.DENSE.get(format)
    if needed is None and activation != "int8":
        needed = torch.bfloat16 if activation == "bf16" else torch.float32
    if needed is not None and x.dtype != needed:
        raise ValueError(
            f"x is {x.dtype}; format {format!r} with activation {activation!r} needs {needed}"
        )
    check_output(bias, out_dtype, n)
