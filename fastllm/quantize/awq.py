"""AWQ: channels whose inputs are large are scaled up before rounding (Lin et al., 2023).

Column j of a weight is multiplied by s_j, which makes its rounding error smaller against its value,
and the layer's input j is divided by s_j. The division goes into what makes the input: the weight
of the norm before, or the rows of the linear layer before. The model computes the same function,
and its files need no new operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Moments, output_error
from .packed import quantize_weight, unpack

POWERS = tuple(i / 20 for i in range(20))
_ROWS = 512  # of a weight whose error is measured: an even sample of them


def search_scales(
    weights: Sequence[Tensor],
    formats: Sequence[str],
    moments: Moments,
    *,
    shared: tuple[int, int] | None = None,
    powers: Sequence[float] = POWERS,
) -> Tensor:
    """Scales of the input channels that make the outputs of rounded weights differ least.

    They are powers of the channels' mean magnitude; which power is found by trying.

    Args:
        weights: float32 `[n, k]`, of layers that share their input.
        formats: of each weight.
        moments: of that input, with its gram matrix.
        shared: (repeats, d): the channels are heads of d, and `repeats` heads, one after another,
            are made from the same head of something else: they get the same scales.
        powers: to try; 0 leaves everything as it is.

    Returns:
        float32 `[k]`.
    """
    assert moments.gram is not None, "asked for with gram"
    magnitude = moments.magnitude
    if shared is not None:
        magnitude = _of_sharing_heads(magnitude, *shared)
    samples = [weight[:: -(-len(weight) // _ROWS)] for weight in weights]
    best, least = torch.ones_like(magnitude), float("inf")
    for power in powers:
        scales = _scales(magnitude, power)
        error = sum(
            _error(sample, format, scales, moments.gram)
            for sample, format in zip(samples, formats, strict=True)
        )
        if error < least:
            best, least = scales, error
    return best


def _of_sharing_heads(magnitude: Tensor, repeats: int, size: int) -> Tensor:
    heads = magnitude.view(-1, repeats, size)
    return heads.mean(1, keepdim=True).expand_as(heads).flatten()


def of_rows(scales: Tensor, repeats: int, size: int) -> Tensor:
    """The scales of the rows that make the channels: one of each `repeats` heads of `size`."""
    return scales.view(-1, repeats, size)[:, 0].flatten()


def _scales(magnitude: Tensor, power: float) -> Tensor:
    scales = magnitude.pow(power).clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def _error(weight: Tensor, format: str, scales: Tensor, gram: Tensor) -> float:
    rounded = unpack(quantize_weight(weight * scales, format)) / scales
    return output_error(rounded - weight, gram)


def fold_into_norm(norm: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(the norm's weight divided by `scales` in its own dtype, the scales that this amounts to).

    The quotient is rounded as it will be stored, and the scales follow from it: what the linear
    layers are multiplied with undoes exactly what the norm does.
    """
    folded = (norm.float() / scales).to(norm.dtype)
    exact = norm.float() / folded.float()
    usable = exact.isfinite() & (exact > 0)
    return torch.where(usable, folded, norm), torch.where(usable, exact, 1.0)
