"""The dense values of a packed weight: every product and sum rounded once, then to y's dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .quant_format import block_values, check_rows, kernel_format, weight_rows
from .triton_compat import cast


@triton.jit
def dequantize_kernel(
    y_ptr, data_ptr, scales_ptr, n_blocks, FORMAT: tl.constexpr, BLOCKS: tl.constexpr
):
    row = tl.program_id(0) + tl.zeros((1,), dtype=tl.int32)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < n_blocks
    data_rows, scale_rows = weight_rows(data_ptr, scales_ptr, row, n_blocks, FORMAT)
    values = block_values(data_rows, scale_rows, block, row >= 0, live, FORMAT).reshape(BLOCKS, 32)
    cols = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    y = y_ptr + tl.program_id(0).to(tl.int64) * n_blocks * 32 + cols
    tl.store(y, cast(values, y_ptr.dtype.element_ty), mask=live[:, None])


def dequantize(data: Tensor, scales: Tensor, format: str, n: int, dtype: torch.dtype) -> Tensor:
    """y[n, K] of `dtype` (f32, bf16 or f16). data, scales: as in `quant_matmul`.

    Raises ValueError for an unknown format or rows that are interleaved.
    """
    n_blocks = check_rows(data, format)
    y = torch.empty((n, n_blocks * 32), dtype=dtype, device=data.device)
    if y.numel() == 0:
        return y
    blocks = min(triton.next_power_of_2(n_blocks), tuning.ELEMENTWISE_BLOCK // 32)
    dequantize_kernel[(n, triton.cdiv(n_blocks, blocks))](
        y,
        data,
        scales,
        n_blocks,
        FORMAT=kernel_format(format),
        BLOCKS=blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return y
