"""The CUDA C++ kernel of `quant_matmul`: what it takes, and its launch.

It serves few tokens in bf16 and weights of 4 and 8 bits, from the packed weight that Triton's
kernels read (csrc/cuda/quant_matmul_rows.cuh says how).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .linear import as_rows
from .quant_format import QUANT_FORMATS

CUDA_FORMATS = tuple(f.name for f in QUANT_FORMATS.values() if f.bits in (4, 8))
# Of csrc/cuda/quant_matmul_params.h.
MAX_TOKENS, WARPS, SEGMENT_BYTES, MAX_SPLITS = 32, 8, 128, 8
MANY_ROWS, WANTED_BLOCKS = 8192, 264


def fits_cuda(x: Tensor, data: Tensor, scales: Tensor, format: str) -> bool:
    """Whether the kernel takes these rows: few, 8-byte aligned; the weight with R = 1."""
    rows = as_rows(x)
    return (
        x.dtype == torch.bfloat16
        and format in CUDA_FORMATS
        and rows.shape[0] <= MAX_TOKENS
        and rows.stride(-1) == 1
        and (rows.shape[0] <= 1 or rows.stride(0) % 4 == 0)
        and rows.data_ptr() % 8 == 0
        and data.data_ptr() % 16 == 0
        and scales.data_ptr() % 4 == 0
        and layout.rows_of(data, format) == 1
    )


def splits_of(format: str, n: int, k: int) -> int:
    """Blocks that share the columns of the same rows, by the weight's shape (`product_splits`)."""
    columns = SEGMENT_BYTES * 8 // QUANT_FORMATS[format].bits
    blocks = -(-n // (32 if n >= MANY_ROWS else 16))
    wanted = -(-WANTED_BLOCKS // max(blocks, 1))
    most = -(-k // columns) // (2 * WARPS)
    return max(1, min(wanted, most, MAX_SPLITS))


def launch(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """`quant_matmul` in mode "bf16" of arguments that `fits_cuda` accepts."""
    rows = as_rows(x)
    m, k = rows.shape
    y = rows.new_empty((m, n), dtype=out_dtype or x.dtype)
    splits = splits_of(format, n, k)
    size = splits * m * n if splits > 1 else 0
    partials = rows.new_empty(size, dtype=torch.float32)
    with torch.cuda.device(x.device):
        _C.quant_matmul_cuda(
            y,
            rows,
            data,
            scales,
            layout.FORMATS.index(format),
            bias,
            partials,
            torch.cuda.current_stream().cuda_stream,
        )
    return y.view(*x.shape[:-1], n)
