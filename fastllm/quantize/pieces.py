"""Quantizing and unpacking a few rows at a time: what that needs besides the result stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .packed import PackedWeight, concat, quantize_weight, unpack

_VALUES = 1 << 16
_TILE = 128  # rows that share scales in fp8_block; a multiple of those interleaved


def in_pieces(weight: Tensor, format: str, importance: Tensor | None) -> PackedWeight:
    """`quantize_weight` of a float32 `[n, k]` weight, some rows at a time: the same bytes."""
    rows = max(_VALUES // weight.shape[1] // 16 * 16, 16)
    if format == "fp8_block":
        rows = -(-rows // _TILE) * _TILE
    return concat([quantize_weight(part, format, importance) for part in weight.split(rows)])


def unpacked_pieces(packed: PackedWeight) -> Iterator[tuple[slice, Tensor]]:
    """Rows one after another: which they are, and their values, float32 [rows, k]."""
    own = packed.rows_per_group
    groups = max(_VALUES // packed.k // own, 1)
    for first in range(0, packed.data.shape[0], groups):
        rows = slice(first * own, min((first + groups) * own, packed.n))
        data, scales = (t[first : first + groups] for t in (packed.data, packed.scales))
        piece = PackedWeight(data, scales, packed.format, rows.stop - rows.start, packed.k)
        yield rows, unpack(piece)


def values_of(packed: PackedWeight) -> Tensor:
    """`unpack`, some rows at a time."""
    values = torch.empty(packed.n, packed.k, dtype=torch.float32, device=packed.device)
    for rows, piece in unpacked_pieces(packed):
        values[rows] = piece
    return values
