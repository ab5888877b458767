"""The sum of squares of a tensor's elements: what norms of gradients are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op


def sum_of_squares_ref(x: Tensor) -> Tensor:
    """Plain PyTorch definition of `sum_of_squares`."""
    return x.float().square().sum()


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


_sum_of_squares = Op("sum_of_squares(Tensor x) -> Tensor", sum_of_squares_ref, fake=_fake)


@_sum_of_squares.impl("native", "cpu", when=lambda x: x.is_contiguous())
def _sum_of_squares_cpu(x: Tensor) -> Tensor:
    total = x.new_empty((), dtype=torch.float32)
    scratch = x.new_empty(_C.sum_of_squares_scratch(x.numel()), dtype=torch.float32)
    _C.sum_of_squares(total, scratch, x)
    return total


@_sum_of_squares.impl("triton", "cuda", when=lambda x: x.is_contiguous())
def _sum_of_squares_triton(*args: Any) -> Tensor:
    from ..kernels import sum_of_squares as kernel

    return kernel.sum_of_squares(*args)


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of the squares of all elements, without a copy of them.

    Args:
        x: float32 or bfloat16, any shape.

    Returns:
        0-dim float32; its bits do not depend on the number of threads.
    """
    return _sum_of_squares(x)
