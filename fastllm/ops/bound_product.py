"""`quant_matmul` with one weight, bound: what a layer calls for each token, outside of autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .linear import as_rows, contiguous_rows, prepared_rows
from .quant_matmul import ACTIVATIONS, VARIANTS


class BoundProduct:
    """`quant_matmul` with one weight on the CPU, checked once, for calls outside of autograd.

    What a layer of one token pays for otherwise is Python: on Zen 5 a product of 576 x 576 takes
    4 us, its checks and views ten times that. dtypes: those of x that it takes.
    """

    __slots__ = ("_arguments", "_bias", "_data", "_k", "_mode", "_n", "_scales", "dtypes")

    def __init__(
        self, data: Tensor, scales: Tensor, format: str, n: int, bias: Tensor | None, mode: str
    ) -> None:
        self._data, self._scales, self._bias = data, scales, bias
        self._n, self._k = n, layout.columns_of(data, format)
        self._arguments = layout.FORMATS.index(format), n
        self._mode = ACTIVATIONS.index(mode)
        own = {"bf16": (torch.bfloat16,), "fp32": (torch.float32,)}
        self.dtypes = own.get(mode, (torch.bfloat16, torch.float32))

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] of a dtype in `dtypes` -> [..., N] in the same."""
        x2 = contiguous_rows(as_rows(x))
        rows, k = x2.shape
        if k != self._k:
            raise ValueError(f"x has {k} columns, the weight {self._k}")
        # In its own shape: a view that is made without grad may not be changed in place with it.
        y = x.new_empty((*x.shape[:-1], self._n))
        _C.quant_matmul(
            y if y.ndim == 2 else y.view(rows, self._n), x2, self._data, self._scales,
            *self._arguments, self._bias, self._mode, prepared_rows(x2),
        )  # fmt: skip
        return y

    def with_term(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """`self(x)` before its rounding, plus scale * round(x a.T) b.T, rounded once: the bits of
        `quant_matmul`, `linear` and `lora_add` one after another.

        a `[r, K]` and b `[N, r]` are on the CPU, of the dtype of x, each row contiguous.
        """
        x2 = contiguous_rows(as_rows(x))
        rows, k = x2.shape
        if k != self._k:
            raise ValueError(f"x has {k} columns, the weight {self._k}")
        base = x2.new_empty((rows, self._n), dtype=torch.float32)
        t, prepared = x2.new_empty((rows, a.shape[0])), prepared_rows(x2)
        _C.quant_matmul(
            base, x2, self._data, self._scales, *self._arguments, self._bias, self._mode, prepared
        )
        _C.linear(t, x2, a, None, prepared)
        y = x.new_empty((*x.shape[:-1], self._n))
        y2 = y if y.ndim == 2 else y.view(rows, self._n)
        _C.lora_add(y2, t, b, base, scale, prepared_rows(t))
        return y


def bound_product(
    data: Tensor, scales: Tensor, format: str, n: int, bias: Tensor | None, mode: str
) -> BoundProduct | None:
    """A `BoundProduct` of these arguments of `quant_matmul`, or None if the native op has none.

    Raises:
        ValueError: as `quant_matmul` does of the weight and the mode.
    """
    k = layout.columns_of(data, format)
    layout.check_packed(data, scales, format, n, k)
    native = data.is_cpu and layout.rows_of(data, format) == layout.ROWS_PER_GROUP["cpu"]
    usual = bias is None or (
        bias.is_cpu and bias.is_contiguous() and bias.dtype in (torch.float32, torch.bfloat16)
    )
    if not (native and usual) or f"{format}/{mode}" not in VARIANTS:
        return None
    return BoundProduct(data, scales, format, n, bias, mode)
