"""Embedding: rows of a dense or a packed table, converted once to the output dtype.

An id outside the table gives a row of zeros: ids come from the sampler inside a captured graph,
which answers -1 for a row of NaN, and no host code can look at them before the read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .quant_format import block_values, check_rows, dense_rows, kernel_format, weight_rows
from .triton_compat import cast


@triton.jit
def embedding_kernel(y_ptr, ids_ptr, weight_ptr, stride_w, n_rows, n_cols, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    inside = (row >= 0) & (row < n_rows)
    values = tl.load(weight_ptr + row * stride_w + cols, mask=inside & (cols < n_cols), other=0.0)
    y = cast(values.to(tl.float32), y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * n_cols + cols, y, mask=cols < n_cols)


@triton.jit
def quant_embedding_kernel(
    y_ptr,
    ids_ptr,
    data_ptr,
    scales_ptr,
    n_rows,
    n_blocks,
    FORMAT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    row = tl.load(ids_ptr + token + tl.zeros((1,), dtype=tl.int32)).to(tl.int64)
    inside = (row >= 0) & (row < n_rows)
    data_rows, scale_rows = weight_rows(data_ptr, scales_ptr, row, n_blocks, FORMAT)
    live = block < n_blocks
    values = block_values(data_rows, scale_rows, block, inside, live, FORMAT)
    values = tl.where(inside[:, None, None], values, 0.0).reshape(BLOCKS, 32)
    cols = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    y = y_ptr + token * n_blocks * 32 + cols
    tl.store(y, cast(values, y_ptr.dtype.element_ty), mask=live[:, None])


def embedding(ids: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """y[..., N] = weight[ids] in `out_dtype`.

    ids[...]: int32 or int64, contiguous; weight[V, N]: f32, bf16 or f16, rows of any stride.
    """
    n_rows, n_cols = weight.shape
    y = torch.empty((*ids.shape, n_cols), dtype=out_dtype, device=weight.device)
    if y.numel() == 0:
        return y
    block = min(triton.next_power_of_2(n_cols), tuning.ELEMENTWISE_BLOCK)
    embedding_kernel[(ids.numel(), triton.cdiv(n_cols, block))](
        y,
        ids.contiguous(),
        weight,
        weight.stride(0),
        n_rows,
        n_cols,
        BLOCK=block,
        num_warps=4,
    )
    return y


def quant_embedding(
    ids: Tensor, data: Tensor, scales: Tensor, format: str, n: int, out_dtype: torch.dtype
) -> Tensor:
    """y[..., K] = rows `ids` of a packed weight of n rows, dequantized in fp32, in `out_dtype`.

    data, scales: as in `quant_matmul`. K is the packed row's length: a multiple of 32, or, for
    format "bf16", of 2. Raises ValueError for an unknown format or rows that are interleaved.
    """
    if format in ("bf16", "f32"):
        return embedding(ids, dense_rows(data, format)[:n], out_dtype)
    n_blocks = check_rows(data, format)
    y = torch.empty((*ids.shape, n_blocks * 32), dtype=out_dtype, device=data.device)
    if y.numel() == 0:
        return y
    blocks = min(triton.next_power_of_2(n_blocks), tuning.ELEMENTWISE_BLOCK // 32)
    quant_embedding_kernel[(ids.numel(), triton.cdiv(n_blocks, blocks))](
        y,
        ids.contiguous(),
        data,
        scales,
        n,
        n_blocks,
        FORMAT=kernel_format(format),
        BLOCKS=blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return y
