"""y = x @ W.T + bias for a weight that stays packed; layouts are in `packed_layout`.

Per chunk of columns either an exact int32 sum (activation "int8") or a dot of x, or of its e4m3
codes ("fp8"), with the unscaled code ("bf16", "fp32"), then one fp32 FMA with the scale and one
with the minimum, chunks in ascending K: a dequantized weight is never rounded, and a row's bits
depend on that row alone. A chunk is 32 columns in mode int8, else what one scale serves, at most
128; the last may be shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .linear import as_rows, check_output, linear_ref, prepared_rows
from .quant_format import (
    NATIVE_FORMATS,
    NF4_INT8,
    QUANT_FORMATS,
    SUPER_BLOCK,
    TRITON_FORMATS,
    WIDEST_CHUNK,
)
from .quant_matmul_input_grad import packed_input_grad
from .registry import Op, batch_invariant

ACTIVATIONS = ("int8", "bf16", "fp32", "fp8")  # in the order of the codes of csrc's enum
E4M3_MAX = 448.0


def variants(formats: Sequence[str]) -> tuple[str, ...]:
    """The variants of these formats: "format/activation", a dense format's name alone."""
    return tuple(
        variant
        for format in formats
        for variant in (
            [format]
            if format in layout.DENSE
            else [f"{format}/{mode}" for mode in QUANT_FORMATS[format].modes]
        )
    )


VARIANTS = variants(layout.FORMATS)


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


def quantize_activation_fp8_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[M, K]` -> e4m3 values as float32 `[M, K]` and their scale dx `[M, ceil(K/128)]`.

    dx = amax / 448 and q = e4m3(x * (448 / amax)) over every 128 columns; zeros, NaN and infinity
    are as in `quantize_activation_ref`.
    """
    k = x.shape[1]
    padded = torch.nn.functional.pad(x.float(), (0, -k % WIDEST_CHUNK))
    blocks = padded.unflatten(-1, (-1, WIDEST_CHUNK))
    amax = blocks.abs().amax(-1)
    inverse = torch.full_like(amax, E4M3_MAX) / amax
    inverse = torch.where(torch.isinf(inverse), 0.0, inverse)
    q = (blocks * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn).float()
    return q.flatten(1)[:, :k], amax / E4M3_MAX


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
    m, k = x2.shape
    codes, d, minimum = operands_ref(data, scales, format, n, k, activation)
    q, dx = x2.float(), None
    if activation == "int8":
        q, dx = quantize_activation_ref(x2)
        q = q.flatten(1)
    elif activation == "fp8":
        q, dx = quantize_activation_fp8_ref(x2)
    acc = torch.zeros(m, n, dtype=torch.float32, device=x.device)
    chunk = QUANT_FORMATS[format].chunk(activation, k)
    for c, start in enumerate(range(0, k, chunk)):
        part = q[:, start : start + chunk]
        dot = part @ codes[:, start : start + chunk].T  # exact for int8: below 2^24
        acc = _fma(dot, d[:, c] if dx is None else d[:, c] * dx[:, c, None], acc)
        if minimum is not None:
            total = _column_sums(part)
            acc = _fma(minimum[:, c], (total if dx is None else total * dx[:, c])[:, None], acc)
    if bias is not None:
        acc = acc + bias.float()
    return acc.to(out_dtype or x.dtype).reshape(*x.shape[:-1], n)


def operands_ref(
    data: Tensor, scales: Tensor, format: str, n: int, k: int, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a mode's products are made of: codes float32 [n, k], and d and m [n, chunks].

    In mode "int8" a q6_k code is multiplied by its sub-block's integer scale, so that one sum
    serves 32 columns, and nf4 has integer codes, 127 to its 1.
    """
    kind = QUANT_FORMATS[format]
    stored = layout.stored_codes(data, format, n)
    codes, group = layout.code_values(stored, format), kind.columns_per_scale(k)
    minimum: Tensor | None = None
    if activation == "int8" and kind.scales == "super":
        wide, sub = (part.float() for part in layout.split_scales(scales, format, n, k))
        codes = codes * layout.spread(sub.flatten(1), format, k)
        d, group = wide[:, :, 0], SUPER_BLOCK
    else:
        d, minimum = layout.block_scales(scales, format, n, k)
    if activation == "int8" and kind.codes == "nf4":
        codes = torch.tensor(NF4_INT8, dtype=torch.float32, device=data.device)[stored.int()]
        d = d * torch.tensor(1 / 127, dtype=torch.float32, device=data.device)
    starts = torch.arange(0, k, kind.chunk(activation, k), device=data.device) // group
    return codes, d[:, starts], None if minimum is None else minimum[:, starts]


def _column_sums(part: Tensor) -> Tensor:
    """[M, C] -> [M]: sums of every 32 columns, added in ascending order."""
    total = part[:, : layout.BLOCK].sum(-1)
    for start in range(layout.BLOCK, part.shape[1], layout.BLOCK):
        total = total + part[:, start : start + layout.BLOCK].sum(-1)
    return total


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


@_quant_matmul.impl(
    "native", "cpu", variants=variants(NATIVE_FORMATS["quant_matmul"]), when=_native_layout
)
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


@_quant_matmul.impl(
    "triton", "cuda", variants=variants(TRITON_FORMATS["quant_matmul"]), when=_one_row_per_group
)
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
        scales: of blocks or rows, laid out there too; empty for the dense formats.
        format: a name of `fastllm.ops.quant_format.QUANT_FORMATS`.
        n: output features N (the packed groups may hold more rows).
        bias: `[N]`, float32 or bfloat16, added in fp32.
        activation: "int8" (x is quantized per 32 columns; not of fp8 formats), "fp8" (x becomes
            e4m3 per 128 columns; of fp8 formats alone), "bf16" (x must be bfloat16) or "fp32" (x
            must be float32). Dense formats need x in their own dtype instead.
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
    check_mode(format, activation, x.dtype)
    check_output(bias, out_dtype, n)


def check_mode(
    format: str, mode: str, dtype: torch.dtype, name: str = "activation", of: str = "x"
) -> None:
    """Raise ValueError unless rows of that dtype, called `of`, can meet the format in that mode."""
    kind = QUANT_FORMATS[format]
    needed = layout.DENSE.get(format)
    if needed is None:
        if mode not in kind.modes:
            raise ValueError(f"{name} {mode!r} is none of {format!r}: use {', '.join(kind.modes)}")
        needed = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(mode)
    if needed is not None and dtype != needed:
        raise ValueError(f"{of} is {dtype}; format {format!r} with {name} {mode!r} needs {needed}")
