"""The values of a packed weight as a dense one: every product and sum rounded once to fp32, and
those once to the dtype that is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .registry import FLOATS, Op

_SCALES = (torch.float16, torch.float32, torch.uint8)  # what scales are stored in


def dequantize_ref(
    data: Tensor, scales: Tensor, format: str, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch definition of `dequantize`."""
    return layout.dequantize(data, scales, format, n, k).to(dtype).contiguous()


def _fake(data: Tensor, scales: Tensor, format: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty((n, k), dtype=dtype)


_dequantize = Op(
    "dequantize(Tensor data, Tensor scales, str format, int n, int k, ScalarType dtype) -> Tensor",
    dequantize_ref,
    fake=_fake,
    variant=lambda data, scales, format, *_: format,
)


def _native_layout(data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == layout.ROWS_PER_GROUP["cpu"]


@_dequantize.impl("native", "cpu", dtypes=_SCALES, variants=layout.QUANTIZED, when=_native_layout)
def _dequantize_cpu(
    data: Tensor, scales: Tensor, format: str, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    y = data.new_empty((n, k), dtype=dtype)
    _C.dequantize(y, data, scales, layout.FORMATS.index(format))
    return y


def _one_row_per_group(data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == 1


@_dequantize.impl(
    "triton", "cuda", dtypes=_SCALES, variants=layout.QUANTIZED, when=_one_row_per_group
)
def _dequantize_cuda(
    data: Tensor, scales: Tensor, format: str, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    from ..kernels import dequantize as kernel

    return kernel.dequantize(data, scales, format, n, dtype)


def dequantize(
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense values of a packed weight.

    Args:
        data, scales: laid out as in `fastllm.ops.packed_layout`, any number of rows interleaved.
        format: any packed format. Dense ones are copied.
        n: rows.
        k: columns.
        dtype: float32, bfloat16 or float16: what the fp32 values are rounded to.

    Returns:
        Contiguous `[n, k]`.

    Raises:
        ValueError: if data and scales are not an `[n, k]` weight of that format, or on another
            dtype.
    """
    layout.check_packed(data, scales, format, n, k, "k is")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be torch.float32, bfloat16 or float16, got {dtype}")
    if format in layout.DENSE:
        return layout.dense_rows(data, format, n, k).to(dtype).contiguous()
    return _dequantize(data, scales, format, n, k, dtype)
