"""What `QuantLinear.weight` is: a tensor to look at, made of packed codes when its values are read.

It has the shape, dtype and device that others expect of a linear layer's weight, and takes no
memory. Reading it gives dequantized values in a plain tensor; writing to it would be lost, and
training it is not possible, so both raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastllm.quantize.packed import PackedWeight, unpack

REMEDY = (
    "the weight of a QuantLinear is packed and cannot be written or trained: train adapters on it, "
    "or make it plain first with fastllm.dequantize_model(model), which merging adapters needs too"
)


class QuantizedValues(Tensor):
    """A read-only tensor `[n, k]`; every operation on it dequantizes all of it.

    packed: gives the codes when values are read (they may have been gathered or moved since).
    """

    packed: Callable[[], PackedWeight]
    # transformers draws weights anew that files lack, and asks the tensor: here there are values.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        packed: Callable[[], PackedWeight],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> QuantizedValues:
        values: QuantizedValues = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device
        )
        values.packed = packed
        return values

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The values, each rounded once from float32, in a plain tensor."""
        if self.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return unpack(self.packed()).to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]._same()
        for argument, given in _by_argument(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tree_map_only(cls, _refuse, given)
        read = tree_map_only(cls, cls.dequantize, (args, dict(kwargs)))
        return func(*read[0], **read[1])

    def _same(self) -> QuantizedValues:
        return QuantizedValues(self.packed, tuple(self.shape), self.dtype, self.device)  # type: ignore[arg-type]

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedValues:  # type: ignore[override]
        """Raises RuntimeError unless `requires_grad` is false."""
        return _refuse(self) if requires_grad else self

    @property
    def data(self) -> QuantizedValues:  # type: ignore[override]
        """The same; assigning to it raises RuntimeError."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse(self)

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """False; setting it raises RuntimeError."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = " x ".join(map(str, self.shape))
        return f"QuantizedValues({shape}, {self.dtype}, {self.device}, read only)"


def _by_argument(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    arguments = func._schema.arguments
    yield from zip(arguments, args, strict=False)
    yield from ((a, kwargs[a.name]) for a in arguments if a.name in kwargs)


def _refuse(values: Any) -> NoReturn:
    raise RuntimeError(REMEDY)
