"""A weight as it lies in a file: format, logical shape, and the bytes or numbers themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllm.quantize.gguf_blocks import DENSE_DTYPES, block_type, dequantize, row_bytes


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One weight, not converted.

    format: "f32", "f16", "bf16", "q4_0", "q4_1" or "q8_0".
    shape: of the values, in torch order, [rows, columns] for a matrix.
    data: dense formats: a tensor of that dtype and shape; quantized: uint8 [rows, bytes_per_row].
          Usually a view of the mapped file: do not write to it.
    """

    format: str
    shape: tuple[int, ...]
    data: Tensor

    def __post_init__(self) -> None:
        block_type(self.format)  # raises on an unknown format
        dtype, expected = DENSE_DTYPES.get(self.format, torch.uint8), self.shape
        if self.format not in DENSE_DTYPES:
            expected = (*self.shape[:-1], row_bytes(self.format, self.shape[-1]))
        if tuple(self.data.shape) != expected or self.data.dtype != dtype:
            raise ValueError(
                f"data of a {self.format} tensor of shape {self.shape} must be {dtype} {expected}, "
                f"got {self.data.dtype} {tuple(self.data.shape)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in memory and in a file."""
        return self.data.numel() * self.data.element_size()

    def to_float32(self) -> Tensor:
        """The values, float32 of `shape`."""
        if self.format in DENSE_DTYPES:
            return self.data.float()
        return dequantize(self.format, self.data)


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
