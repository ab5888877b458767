"""A weight as it lies in a file: format, logical shape, and the bytes or numbers themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.quantize.gguf_blocks import (
    DENSE_DTYPES,
    QUANTIZED_FORMATS,
    block_type,
    dequantize,
    row_bytes,
)
from fastllm.quantize.packed import PackedWeight, gguf_rows


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One weight, not converted.

    format: "f32", "f16", "bf16", or a quantized one of `fastllm.ops.quant_format`.
    shape: of the values, in torch order, [rows, columns] for a matrix.
    data: dense formats: a tensor of that dtype and shape; GGUF's: uint8 [rows, bytes_per_row];
          others: codes in the layout of one row a group (`fastllm.ops.packed_layout`).
          Usually a view of the mapped file: do not write to it.
    scales: of formats that are neither dense nor GGUF's, in the same layout; else None.
    """

    format: str
    shape: tuple[int, ...]
    data: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        dtype, expected = DENSE_DTYPES.get(self.format, torch.uint8), self.shape
        if self.format in QUANT_FORMATS and not (self.dense or self.format in QUANTIZED_FORMATS):
            self._check_canonical()
            return
        block_type(self.format)  # raises on an unknown format
        if not self.dense:
            expected = (*self.shape[:-1], row_bytes(self.format, self.shape[-1]))
        fits = tuple(self.data.shape) == expected and self.data.dtype == dtype
        if not fits or self.scales is not None:
            raise ValueError(
                f"data of a {self.format} tensor of shape {self.shape} must be {dtype} {expected}, "
                f"got {self.data.dtype} {tuple(self.data.shape)}"
            )

    def _check_canonical(self) -> None:
        *lead, k = self.shape
        if self.scales is None or not lead:
            raise ValueError(f"a {self.format} tensor needs scales and rows")
        data = (*lead, *layout.data_shape(self.format, 1, k, 1)[1:])
        scales = (*lead, *layout.scales_shape(self.format, 1, k, 1)[1:])
        if (tuple(self.data.shape), tuple(self.scales.shape)) != (data, scales):
            raise ValueError(
                f"a {self.format} tensor of shape {self.shape} has data {data} and scales "
                f"{scales}, got {tuple(self.data.shape)} and {tuple(self.scales.shape)}"
            )

    @classmethod
    def of_canonical(
        cls, format: str, data: Tensor, scales: Tensor, n: int, k: int
    ) -> StoredTensor:
        """A quantized matrix from the layout of one row a group."""
        if format in QUANTIZED_FORMATS:
            return cls(format, (n, k), gguf_rows(PackedWeight(data, scales, format, n, k)))
        return cls(format, (n, k), data, scales)

    @property
    def dense(self) -> bool:
        """Whether the values are stored as numbers."""
        return self.format in DENSE_DTYPES

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in memory and in a file."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def to_float32(self) -> Tensor:
        """The values, float32 of `shape`."""
        if self.dense:
            return self.data.float()
        if self.scales is None:
            return dequantize(self.format, self.data)
        *lead, k = self.shape
        n = math.prod(lead)
        data, scales = (t.flatten(0, len(lead) - 1).contiguous() for t in (self.data, self.scales))
        return layout.dequantize(data, scales, self.format, n, k).view(self.shape)

    def __getitem__(self, index: int | slice | Tensor) -> StoredTensor:
        """Rows, or matrices of a stack, by an index of the first dimension."""

        def of(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index) if isinstance(index, Tensor) else tensor[index]

        data = of(self.data)
        lead = () if isinstance(index, int) else (data.shape[0],)
        scales = None if self.scales is None else of(self.scales)
        return StoredTensor(self.format, (*lead, *self.shape[1:]), data, scales)


def joined(parts: Sequence[StoredTensor], dim: int = 0) -> StoredTensor:
    """Tensors one after another along `dim`, not the last; of different formats in float32."""
    if len(parts) == 1:
        return parts[0]
    parts = _alike(parts)
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return _combined(parts, tuple(shape), lambda tensors: torch.cat(tensors, dim))


def stacked(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Tensors of one shape along a new first dimension; of different formats in float32."""
    parts = _alike(parts)
    return _combined(parts, (len(parts), *parts[0].shape), torch.stack)


def _alike(parts: Sequence[StoredTensor]) -> Sequence[StoredTensor]:
    if len({part.format for part in parts}) == 1:
        return parts
    return [StoredTensor("f32", part.shape, part.to_float32()) for part in parts]


def _combined(
    parts: Sequence[StoredTensor],
    shape: tuple[int, ...],
    combine: Callable[[list[Tensor]], Tensor],
) -> StoredTensor:
    scales = [part.scales for part in parts if part.scales is not None]
    data = combine([part.data for part in parts])
    return replace(parts[0], shape=shape, data=data, scales=combine(scales) if scales else None)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A weight that is made when it is written, so that a file is never in memory as a whole."""

    format: str
    shape: tuple[int, ...]
    make: Callable[[], StoredTensor]  # of that format and shape

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in a file."""
        return math.prod(self.shape[:-1]) * row_bytes(self.format, self.shape[-1])

    @property
    def data(self) -> Tensor:
        """As `StoredTensor.data`; made anew at each access."""
        stored = self.make()
        if (stored.format, stored.shape) != (self.format, self.shape):
            raise ValueError(
                f"a {self.format} tensor of shape {self.shape} was announced, and a "
                f"{stored.format} of {stored.shape} made"
            )
        return stored.data
