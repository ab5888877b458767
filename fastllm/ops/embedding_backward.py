"""Gradient of an embedding's table: the rows of dy added up by id.

Rows of one id are added in the order of the tokens, in fp32, and rounded once, whatever the number
of threads; an id outside the table, which read zeros, adds nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op


def embedding_backward_ref(dy: Tensor, ids: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch definition of `embedding_backward`."""
    flat = ids.reshape(-1).long()
    inside = (flat >= 0) & (flat < n)
    rows = torch.where(inside.unsqueeze(-1), dy.float().reshape(flat.shape[0], dy.shape[-1]), 0.0)
    sums = torch.zeros((n, dy.shape[-1]), dtype=torch.float32, device=dy.device)
    return sums.index_add_(0, torch.where(inside, flat, 0), rows).to(dtype) if n else sums.to(dtype)


def _fake(dy: Tensor, ids: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((n, dy.shape[-1]), dtype=dtype)


# dy [*ids.shape, N] -> [n, N] in dtype.
embedding_backward = Op(
    "embedding_backward(Tensor dy, Tensor ids, int n, ScalarType dtype) -> Tensor",
    embedding_backward_ref,
    fake=_fake,
)


def _native(dy: Tensor, ids: Tensor, *_: Any) -> bool:
    return dy.is_contiguous() and ids.is_contiguous()


@embedding_backward.impl("native", "cpu", when=_native)
def _embedding_backward_cpu(dy: Tensor, ids: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    dweight = dy.new_empty((n, dy.shape[-1]), dtype=dtype)
    order = ids.new_empty(n + 1 + ids.numel(), dtype=torch.int32)  # tokens sorted by id
    _C.embedding_backward(dweight, dy, ids, order)
    return dweight


@embedding_backward.impl("triton", "cuda")
def _embedding_backward_triton(*args: Any) -> Tensor:
    from ..kernels import embedding_backward as kernel

    return kernel.embedding_backward(*args)
