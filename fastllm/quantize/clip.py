"""Clipping: outliers of a group are cut where that lets the others be represented better."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.quant_format import QUANT_FORMATS
from .packed import quantize_weight, unpack

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_ROWS = 256  # whose candidates are made at once


def gains_by_clipping(format: str) -> bool:
    """Whether the largest magnitude of a group alone decides its scale, at few bits.

    Codes of 8 bits lose nothing to outliers, and the quantizers of other formats search by
    themselves.
    """
    return QUANT_FORMATS[format].codes == "nf4"


def clipped(
    weight: Tensor, format: str, importance: Tensor, shares: Sequence[float] = SHARES
) -> Tensor:
    """The weight with every group's outliers cut where its weighted squared error is least.

    Args:
        weight: float32 `[n, k]`.
        format: whose groups and rounding are meant.
        importance: float32 `[k]`, the weights of squared errors.
        shares: of a group's largest magnitude to try; 1 leaves it.

    Returns:
        float32 `[n, k]`; `weight` itself where the format does not gain.
    """
    if not gains_by_clipping(format):
        return weight
    group = QUANT_FORMATS[format].columns_per_scale(weight.shape[1])
    best = torch.cat([_limits(rows, format, importance, group, shares) for rows in
                      weight.split(_ROWS)])  # fmt: skip
    limits = best.repeat_interleave(group, 1)
    return weight.clamp(-limits, limits)


def _limits(
    weight: Tensor, format: str, importance: Tensor, group: int, shares: Sequence[float]
) -> Tensor:
    """The best limit of each group, `[n, groups]`."""
    peak = weight.abs().unflatten(1, (-1, group)).amax(2)
    limits, least = peak.clone(), torch.full_like(peak, float("inf"))
    for share in shares:
        limit = (share * peak).repeat_interleave(group, 1)
        values = unpack(quantize_weight(weight.clamp(-limit, limit), format, importance))
        error = ((values - weight).square() * importance).unflatten(1, (-1, group)).sum(2)
        better = error < least
        limits = torch.where(better, share * peak, limits)
        least = torch.where(better, error, least)
    return limits
