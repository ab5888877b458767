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
from .gated_activation import ACTIVATIONS as GATED_ACTIVATIONS
from .gated_activation import gated_activation
from .linear import as_rows, check_output, contiguous_rows, prepared_rows
from .quant_format import QUANT_FORMATS
from .quant_matmul_cuda import CUDA_FORMATS, fits_cuda, launch
from .quant_matmul_input_grad import packed_input_grad
from .quant_products import dot_ref, products_ref
from .registry import Op, batch_invariant
from .swiglu_backward import swiglu_backward

ACTIVATIONS = ("int8", "bf16", "fp32", "fp8")  # in the order of the codes of csrc's enum
GATED = ("silu", "gelu_tanh")


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


def quant_matmul_ref(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    gated: str = "",
) -> Tensor:
    """Plain PyTorch definition of `quant_matmul`."""
    if format in layout.DENSE:
        weight = layout.dense_rows(data, format, n, x.shape[-1])
        sums = dot_ref(as_rows(x).float(), weight.float())
    else:
        sums = products_ref(as_rows(x), data, scales, format, n, activation)
    sums = sums.reshape(*x.shape[:-1], n)
    sums = sums if bias is None else sums + bias.float()
    return finished_ref(sums, x.dtype, out_dtype, residual, gated)


def finished_ref(
    sums: Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    residual: Tensor | None,
    gated: str,
) -> Tensor:
    """What follows the sums of a product of rows in `dtype`; sums are float32 or float64."""
    if residual is not None:
        return residual + sums.to(dtype).to(sums.dtype)
    if gated:
        gate, up = sums.to(dtype).to(sums.dtype).chunk(2, dim=-1)
        return gated_activation(gate, up, gated).to(dtype)
    return sums.to(out_dtype or dtype)


def _quant_matmul_fake(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    gated: str = "",
) -> Tensor:
    dtype = torch.float32 if residual is not None else out_dtype or x.dtype
    return x.new_empty((*x.shape[:-1], n // 2 if gated else n), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, data, scales, ctx.format, ctx.n, bias, ctx.activation, _, _, ctx.gated = inputs
    ctx.save_for_backward(data, scales, *((x, bias) if ctx.gated else ()))
    ctx.x_dtype, ctx.k = x.dtype, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # The weight is frozen; rounding of quantized activations is passed straight through.
    data, scales, *rest = ctx.saved_tensors
    dx = dbias = None
    # torch's dispatcher leaves trailing arguments out that have their defaults
    dresidual = dy if any(ctx.needs_input_grad[8:9]) else None
    wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[5]
    if ctx.gated and (ctx.needs_input_grad[0] or wants_bias):
        x, bias = rest
        with torch.no_grad():
            pre = _quant_matmul(
                x, data, scales, ctx.format, ctx.n, bias, ctx.activation, None, None, ""
            )
        dy = _gated_backward(dy, pre, ctx.gated)
    if ctx.needs_input_grad[0]:
        dx = packed_input_grad(dy.to(ctx.x_dtype), data, scales, ctx.format, ctx.n, ctx.k)
    if wants_bias:
        dbias = as_rows(dy.float()).sum(0).to(ctx.bias_dtype)
    return dx, None, None, None, None, dbias, None, None, dresidual, None


def _gated_backward(dy: Tensor, pre: Tensor, gated: str) -> Tensor:
    """The gradient of pre `[..., N]` in its dtype from that of the gated output."""
    gate, up = pre.chunk(2, dim=-1)
    return swiglu_backward(dy.contiguous(), gate, up, gated)


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
    "str activation, ScalarType? out_dtype=None, Tensor? residual=None, str gated='') -> Tensor",
    quant_matmul_ref,
    fake=_quant_matmul_fake,
    backward=_backward,
    setup_context=_save,
    variant=_variant,
)


def _native_layout(x: Tensor, data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == layout.ROWS_PER_GROUP["cpu"]


def _option(
    n: int, bias: Any, activation: str, out_dtype: Any = None, residual: Any = None, gated: str = ""
) -> str:
    """What follows the product: nothing, "residual" or the name of a gated activation."""
    return gated if residual is None else "residual"


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
    residual: Tensor | None = None,
    gated: str = "",
) -> Tensor:
    x2 = contiguous_rows(as_rows(x))
    rows, code, mode = x2.shape[0], layout.FORMATS.index(format), ACTIVATIONS.index(activation)
    option = _option(n, bias, activation, out_dtype, residual, gated)
    # Made in its own shape: autograd forbids to change an output in place that is a view.
    if not option:
        y = x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
        y2 = y.view(rows, n)
        _C.quant_matmul(y2, x2, data, scales, code, n, bias, mode, prepared_rows(x2))
        return y
    columns = n // 2 if gated else n
    y = x.new_empty((*x.shape[:-1], columns), dtype=None if gated else torch.float32)
    y2 = y.view(rows, columns)
    base = None if residual is None else as_rows(residual).contiguous()
    act = GATED_ACTIVATIONS.index(gated) if gated else 0
    if not _fused(format, n, option):
        product = _quant_matmul_cpu(x2, data, scales, format, n, bias, activation)
        _C.finish_product(y2, product, base, act)
        return y
    _C.finished_product(y2, x2, data, scales, code, n, bias, mode, prepared_rows(x2), base, act)
    return y


def _fused(format: str, n: int, option: str) -> bool:
    """Whether the kernel goes on with what follows the product: gate and up in whole panels."""
    return format not in layout.DENSE and (option == "residual" or n % 32 == 0)


if hasattr(_C, "quant_matmul_cuda"):  # the extension was built with CUDA

    def _few_rows(
        x: Tensor, data: Tensor, scales: Tensor, format: str, n: int, bias: Any, *rest: Any
    ) -> bool:
        # More rows are Triton's: in batch-invariant mode all must be summed in one order.
        whole = (bias is None or bias.is_contiguous()) and not batch_invariant()
        return whole and _option(n, bias, *rest) == "" and fits_cuda(x, data, scales, format)

    @_quant_matmul.impl(
        "cuda",
        "cuda",
        variants=tuple(f"{format}/bf16" for format in CUDA_FORMATS),
        when=_few_rows,
        opt_in=True,
    )
    def _quant_matmul_few(
        x: Tensor,
        data: Tensor,
        scales: Tensor,
        format: str,
        n: int,
        bias: Tensor | None,
        activation: str,
        out_dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
        gated: str = "",
    ) -> Tensor:
        return launch(x, data, scales, format, n, bias, out_dtype)


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
    residual: Tensor | None = None,
    gated: str = "",
) -> Tensor:
    from ..kernels import quant_matmul as kernel

    return kernel.quant_matmul(
        x, data, scales, format, n, bias, activation, out_dtype, residual, gated,
        batch_invariant=batch_invariant(),
    )  # fmt: skip


def quant_matmul(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None = None,
    activation: str = "int8",
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    gated: str = "",
) -> Tensor:
    """`x @ W.T + bias` with a packed weight; differentiable in `x`, `bias` and `residual`.

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
        residual: float32 `[..., N]`, or None; the product is rounded to the dtype of x and added.
        gated: "silu" or "gelu_tanh": rows of W are those of gate, then those of up, and the result
            is act(gate) * up, of products rounded to the dtype of x. "": no activation.

    Returns:
        Contiguous `[..., N]`; float32 with a residual; `[..., N / 2]` in the dtype of x if gated.

    Raises:
        ValueError: on mismatched shapes, dtypes or names, naming the argument.
    """
    _check(x, data, scales, format, n, bias, activation, out_dtype)
    bias = bias if bias is None else bias.contiguous()
    if residual is not None or gated:
        _check_options(x, n, out_dtype, residual, gated)
    return _quant_matmul(x, data, scales, format, n, bias, activation, out_dtype, residual, gated)


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


def _check_options(
    x: Tensor, n: int, out_dtype: torch.dtype | None, residual: Tensor | None, gated: str
) -> None:
    if residual is not None and gated:
        raise ValueError("residual and gated exclude each other: their sizes differ")
    if gated and gated not in GATED:
        raise ValueError(f"gated {gated!r} is not one of {', '.join(GATED)}")
    if gated and n % 2:
        raise ValueError(f"gated needs rows of gate and as many of up, n is {n}")
    made = torch.float32 if residual is not None else x.dtype
    if out_dtype not in (None, made):
        raise ValueError(f"out_dtype is {out_dtype}; with residual or gated the result is {made}")
    if residual is None:
        return
    shape = (*x.shape[:-1], n)
    if residual.dtype != torch.float32 or tuple(residual.shape) != shape:
        raise ValueError(
            f"residual must be float32 of shape {shape}, "
            f"got {residual.dtype} of {tuple(residual.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device} and x on {x.device}")


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
