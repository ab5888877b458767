"""Muon's direction: a matrix of momentum with its singular values pulled towards one.

Jordan et al., 2024 (kellerjordan.github.io/posts/muon): five steps of a quintic Newton-Schulz
iteration, which needs products alone, on the momentum divided by its norm. The polynomial is steep
at zero and does not converge: singular values end between about 0.7 and 1.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5
STEPS = 5
_LEAST_NORM = 1e-7
_BATCH_VALUES = 1 << 20  # of a batch of matrices that are iterated together


def orthogonalize(matrix: Tensor, steps: int = STEPS, stacked: int = 1) -> Tensor:
    """The nearly orthogonal matrix of the same singular vectors.

    Args:
        matrix: `[..., M, N]`; leading dimensions are a batch of matrices.
        steps: of the iteration.
        stacked: matrices that lie one below the other in the M rows; each counts by itself.

    Returns:
        bfloat16, shaped like `matrix`; the products run in bfloat16, which the iteration bears.

    Raises:
        ValueError: if `matrix` has fewer than two dimensions, or its rows are no multiple of
            `stacked`.
    """
    if matrix.ndim < 2:
        raise ValueError(f"matrix must have two dimensions or more, got {tuple(matrix.shape)}")
    if matrix.shape[-2] % stacked:
        raise ValueError(f"{matrix.shape[-2]} rows are not {stacked} stacked matrices")
    if stacked > 1 or matrix.ndim > 3:
        batch = matrix.reshape(-1, matrix.shape[-2] // stacked, matrix.shape[-1])
        return orthogonalize(batch, steps).view(matrix.shape)
    if matrix.ndim == 3 and matrix.shape[0]:
        # A few matrices at a time, so that what five products read stays in cache.
        few = max(_BATCH_VALUES // max(matrix[0].numel(), 1), 1)
        return torch.cat([_iterate(part, steps) for part in matrix.split(few)])
    return _iterate(matrix, steps)


def _iterate(matrix: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.bfloat16()
    if tall:  # the smaller Gram matrix
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = _combine(x, _combine(gram, gram, gram, b, c), x, a, 1.0)
    return x.mT if tall else x


def _combine(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    # beta * base + alpha * left @ right, rounded once.
    product = torch.addmm if base.ndim == 2 else torch.baddbmm
    return product(base, left, right, beta=beta, alpha=alpha)


def rate_factor(shape: torch.Size, match_rms: bool) -> float:
    """What the learning rate of a matrix is multiplied by.

    Args:
        shape: `[..., M, N]` of the parameter.
        match_rms: True: the update's root mean square is about 0.2, that of AdamW, so that AdamW's
            rate and decay serve (Liu et al., 2025, arXiv 2502.16982). False: sqrt(max(1, M / N)).
    """
    rows, columns = shape[-2:]
    if match_rms:
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
