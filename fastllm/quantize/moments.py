"""What a linear layer's inputs are like: sums over calibration tokens, made batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS = 1024  # converted to float32 at once


class Moments:
    """Sums over the inputs x [T, K] of a layer, float32.

    squares: `[K]`, the sum of x^2. absolute: `[K]`, the sum of |x|. gram: `[K, K]`, the sum of
    x^T x, where it is wanted. count: tokens.
    """

    def __init__(self, columns: int, *, gram: bool) -> None:
        self.count = 0
        self.squares = torch.zeros(columns)
        self.absolute = torch.zeros(columns)
        self.gram = torch.zeros(columns, columns) if gram else None

    def add(self, x: Tensor) -> None:
        """Add inputs `[..., K]` of any floating dtype.

        Raises:
            ValueError: if they hold NaN or infinity.
        """
        rows = x.detach().flatten(0, -2)
        for part in rows.split(_TOKENS):
            values = part.float()
            squares = values.square().sum(0)
            if not bool(torch.isfinite(squares).all()):
                raise ValueError("activations hold NaN or infinity: the model is broken")
            self.squares += squares
            self.absolute += values.abs().sum(0)
            if self.gram is not None:
                self.gram.addmm_(values.t(), values)
        self.count += rows.shape[0]

    @property
    def importance(self) -> Tensor:
        """Mean of x^2, float32 `[K]`; ones where nothing was counted."""
        return self.squares / self.count if self.count else torch.ones_like(self.squares)

    @property
    def magnitude(self) -> Tensor:
        """Mean of |x|, float32 `[K]`; ones where nothing was counted."""
        return self.absolute / self.count if self.count else torch.ones_like(self.absolute)


def output_error(difference: Tensor, gram: Tensor) -> float:
    """Sum of (x d^T)^2 over the inputs behind `gram`, of a difference d [n, K] of weights."""
    total = 0.0
    for rows in difference.split(_TOKENS):
        total += float(((rows @ gram) * rows).sum())
    return max(total, 0.0)
