"""Rows of a tensor, some more than once, with a gradient that adds up what each was used for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.ops.embedding_backward import embedding_backward


class _TakeRows(torch.autograd.Function):
    """torch's gradient would add bfloat16 rows in bfloat16, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        flat = dy.reshape(rows.shape[0], -1).contiguous()
        dx = embedding_backward(flat, rows, ctx.count, dy.dtype)
        return dx.view(ctx.count, *dy.shape[1:]), None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`: `[T, ...]` and `[N]` int64 -> `[N, ...]`.

    The gradients of a row's uses are added in fp32, in their order, and rounded once.
    """
    taken: Tensor = _TakeRows.apply(x, rows)
    return taken
