"""Embedding: rows of a dense or of a packed table, rounded once to the output dtype.

Kernels never read outside the table: an id outside `[0, V)` gives a row of zeros. Eager calls on
the CPU raise instead. Inside a captured graph ids come from the sampler (-1 after a row of NaN),
which nothing can look at before the read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .embedding_backward import embedding_backward
from .registry import Op, gradient_dtype

_TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of scales or dense values; of the ids where codes and scales are bytes.
_PACKED_DTYPES = (*_TABLE_DTYPES, torch.int32, torch.int64)


def embedding_ref(ids: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Plain PyTorch definition of `embedding`."""
    safe, inside = _clamp(ids, weight.shape[0])
    rows = weight[safe].float() if weight.shape[0] else ids.new_zeros((*ids.shape, weight.shape[1]))
    return torch.where(inside.unsqueeze(-1), rows, 0.0).to(out_dtype)


def quant_embedding_ref(
    ids: Tensor, data: Tensor, scales: Tensor, format: str, n: int, out_dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch definition of `quant_embedding`."""
    table = layout.dequantize(data, scales, format, n, layout.columns_of(data, format))
    return embedding_ref(ids, table, out_dtype)


def _clamp(ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    wide = ids.long()
    return wide.clamp(0, max(n - 1, 0)), (wide >= 0) & (wide < n)


def _embedding_fake(ids: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=out_dtype)


def _quant_embedding_fake(
    ids: Tensor, data: Tensor, scales: Tensor, format: str, n: int, out_dtype: torch.dtype
) -> Tensor:
    return data.new_empty((*ids.shape, layout.columns_of(data, format)), dtype=out_dtype)


def _save_embedding(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, weight, _ = inputs
    ctx.save_for_backward(ids)
    ctx.rows, ctx.dtype = weight.shape[0], gradient_dtype(weight)


def _embedding_grads(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    (ids,) = ctx.saved_tensors
    return None, embedding_backward(dy.contiguous(), ids.contiguous(), ctx.rows, ctx.dtype), None


_embedding = Op(
    "embedding(Tensor ids, Tensor weight, ScalarType out_dtype) -> Tensor",
    embedding_ref,
    fake=_embedding_fake,
    backward=_embedding_grads,
    setup_context=_save_embedding,
)
_quant_embedding = Op(
    "quant_embedding(Tensor ids, Tensor data, Tensor scales, str format, int n, "
    "ScalarType out_dtype) -> Tensor",
    quant_embedding_ref,
    fake=_quant_embedding_fake,
    variant=lambda ids, data, scales, format, *_: format,
)


@_embedding.impl("native", "cpu", dtypes=_TABLE_DTYPES, when=lambda ids, w, _: w.stride(-1) == 1)
def _embedding_cpu(ids: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    y = weight.new_empty((*ids.shape, weight.shape[1]), dtype=out_dtype)
    _C.embedding(y, ids.contiguous(), weight)
    return y


@_embedding.impl("triton", "cuda", dtypes=_TABLE_DTYPES)
def _embedding_cuda(ids: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    from ..kernels import embedding as kernel

    return kernel.embedding(ids, weight, out_dtype)


def _native_layout(ids: Tensor, data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == layout.ROWS_PER_GROUP["cpu"]


@_quant_embedding.impl(
    "native",
    "cpu",
    dtypes=_PACKED_DTYPES,
    variants=layout.FORMATS,
    when=_native_layout,
)
def _quant_embedding_cpu(
    ids: Tensor, data: Tensor, scales: Tensor, format: str, n: int, out_dtype: torch.dtype
) -> Tensor:
    y = data.new_empty((*ids.shape, layout.columns_of(data, format)), dtype=out_dtype)
    _C.quant_embedding(y, ids.contiguous(), data, scales, layout.FORMATS.index(format), n)
    return y


def _one_row_per_group(ids: Tensor, data: Tensor, scales: Tensor, format: str, *_: Any) -> bool:
    return layout.rows_of(data, format) == 1


@_quant_embedding.impl(
    "triton",
    "cuda",
    dtypes=_PACKED_DTYPES,
    variants=layout.FORMATS,
    when=_one_row_per_group,
)
def _quant_embedding_cuda(
    ids: Tensor, data: Tensor, scales: Tensor, format: str, n: int, out_dtype: torch.dtype
) -> Tensor:
    from ..kernels import embedding as kernel

    return kernel.quant_embedding(ids, data, scales, format, n, out_dtype)


def embedding(ids: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Rows `weight[ids]`; differentiable in `weight`.

    Args:
        ids: any shape, int32 or int64.
        weight: `[V, N]`, float32, bfloat16 or float16.
        out_dtype: float32 or bfloat16; default that of `weight` (float32 for a float16 table).

    Returns:
        Contiguous `[*ids.shape, N]`.

    Raises:
        ValueError: on wrong dtypes or shapes; on an id outside `[0, V)` in an eager call on the
            CPU. (On a GPU and inside a captured graph such an id gives a row of zeros.)
    """
    if weight.dim() != 2 or weight.dtype not in _TABLE_DTYPES:
        raise ValueError(
            "weight must be a [V, N] table of float32, bfloat16 or float16, "
            f"got {weight.dtype} of {tuple(weight.shape)}"
        )
    if out_dtype is None:
        out_dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    _check_ids(ids, weight.shape[0], out_dtype)
    return _embedding(ids, weight, out_dtype)


def quant_embedding(
    ids: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows `ids` of a packed table of `n` rows, dequantized in fp32 and rounded once.

    Args:
        ids: any shape, int32 or int64.
        data: the packed codes, laid out as in `fastllm.ops.packed_layout`.
        scales: of blocks or rows, laid out there too; empty for the dense formats.
        format: a name of `fastllm.ops.quant_format.QUANT_FORMATS`.
        n: rows of the table.
        out_dtype: float32 or bfloat16.

    Returns:
        Contiguous `[*ids.shape, K]`; K of a bf16 table is rounded up to even, as it is packed.

    Raises:
        ValueError: as `embedding`.
    """
    layout.check_packed(data, scales, format, n)
    _check_ids(ids, n, out_dtype)
    return _quant_embedding(ids, data, scales, format, n, out_dtype)


def _check_ids(ids: Tensor, n: int, out_dtype: torch.dtype) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"out_dtype must be torch.float32 or torch.bfloat16, got {out_dtype}")
    if type(ids) is not Tensor or ids.device.type != "cpu" or not ids.numel():
        return
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _C.recording():
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= n:
        raise ValueError(f"ids must be in [0, {n}), found {low if low < 0 else high}")
