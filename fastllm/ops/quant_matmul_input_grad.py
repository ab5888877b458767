"""dx = dy @ W for a weight that stays packed: the gradient that `quant_matmul` gives its input.

W is dequantized block by block on the way and rounded to the dtype of dy, as a stored copy of it
would be; there is never an `[N, K]` copy. Sums are fp32, over ascending rows of W on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .linear import as_rows, prepared_rows
from .registry import Op


def quant_matmul_input_grad_ref(
    dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Plain PyTorch definition of `quant_matmul_input_grad`."""
    n, k = dy.shape[-1], layout.columns_of(data, format)
    weight = layout.dequantize(data, scales, format, n, k).to(dy.dtype)
    return (dy.float() @ weight.float()).to(out_dtype or dy.dtype)


def _fake(
    dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    shape = (*dy.shape[:-1], layout.columns_of(data, format))
    return dy.new_empty(shape, dtype=out_dtype or dy.dtype)


def _variant(dy: Tensor, data: Tensor, scales: Tensor, format: str, *_: Any) -> str:
    return format


_quant_matmul_input_grad = Op(
    "quant_matmul_input_grad(Tensor dy, Tensor data, Tensor scales, str format, "
    "ScalarType? out_dtype=None) -> Tensor",
    quant_matmul_input_grad_ref,
    fake=_fake,
    variant=_variant,
)


def _native_layout(dy: Tensor, data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == layout.ROWS_PER_GROUP["cpu"]


@_quant_matmul_input_grad.impl(
    "native",
    "cpu",
    variants=layout.QUANTIZED,
    when=_native_layout,
)
def _quant_matmul_input_grad_cpu(
    dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    dy2 = as_rows(dy)
    if dy2.stride(-1) != 1:  # gradients come as autograd makes them, expanded ones too
        dy2 = dy2.contiguous()
    k = layout.columns_of(data, format)
    dx = dy2.new_empty((dy2.shape[0], k), dtype=out_dtype)
    code = layout.FORMATS.index(format)
    _C.quant_matmul_input_grad(dx, dy2, data, scales, code, prepared_rows(dy2))
    return dx.view(*dy.shape[:-1], k)


def _one_row_per_group(dy: Tensor, data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == 1


@_quant_matmul_input_grad.impl(
    "triton",
    "cuda",
    variants=layout.QUANTIZED,
    when=_one_row_per_group,
)
def _quant_matmul_input_grad_cuda(
    dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    from ..kernels import quant_matmul_input_grad as kernel

    return kernel.quant_matmul_input_grad(dy, data, scales, format, out_dtype)


def quant_matmul_input_grad(
    dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`dy @ W` with W `[N, K]` packed; what a loss's gradient by `x @ W.T` becomes for x.

    Args:
        dy: `[..., N]`, float32 or bfloat16; W is rounded to its dtype.
        data: the packed codes, laid out as in `fastllm.ops.packed_layout`.
        scales: of blocks or rows, laid out there too.
        format: a quantized one of `fastllm.ops.quant_format.QUANT_FORMATS`.
        out_dtype: float32 or bfloat16; default that of `dy`.

    Returns:
        Contiguous `[..., K]`.

    Raises:
        ValueError: on mismatched shapes, dtypes or names, naming the argument.
    """
    if dy.dtype not in (torch.float32, torch.bfloat16) or dy.dim() < 1:
        raise ValueError(
            "dy must be float32 or bfloat16 with at least one dimension, "
            f"got {dy.dtype} of {tuple(dy.shape)}"
        )
    layout.check_format(format)
    if format in layout.DENSE:
        raise ValueError(f"format {format!r} is dense: its product is dy @ W")
    if out_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"out_dtype must be torch.float32 or torch.bfloat16, got {out_dtype}")
    layout.check_packed(data, scales, format, dy.shape[-1])
    return _quant_matmul_input_grad(dy, data, scales, format, out_dtype)


def packed_input_grad(
    dy: Tensor, data: Tensor, scales: Tensor, format: str, n: int, k: int
) -> Tensor:
    """`dy @ W` in the dtype of `dy` for a weight `[n, k]` in any packed format, dense ones too."""
    if format in layout.DENSE:
        return dy @ layout.dense_rows(data, format, n, k)
    return quant_matmul_input_grad(dy, data, scales, format)
