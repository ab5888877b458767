"""`QuantLinear`: a linear layer of PyTorch whose weight is packed, for models that others define.

It is an `nn.Linear` to whoever asks: adapters of PEFT go on it, FSDP2 shards it, `state_dict` saves
it. The weight is `PackedMatrix`'s: two frozen parameters of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastllm.nn.low_rank import FrozenBase, LowRank, trained_products
from fastllm.nn.packed_matrix import PackedMatrix, frozen, is_sharded
from fastllm.ops.bound_product import BoundProduct, bound_product
from fastllm.ops.quant_format import QUANT_FORMATS, format_of
from fastllm.ops.quant_matmul import ACTIVATIONS, quant_matmul
from fastllm.ops.quant_matmul_input_grad import packed_input_grad
from fastllm.ops.registry import is_eager
from fastllm.quantize.packed import PackedWeight, quantize_weight

_COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}


class QuantLinear(PackedMatrix, nn.Linear):  # type: ignore[override]
    """y = x W^T + b with a quantized W; differentiable in x and b, W is frozen.

    `weight`, `state_dict` and moves are `PackedMatrix`'s.

    activation: how inputs meet the codes: "bf16" and "fp32" round x to that dtype, "int8" to 8 bits
        for every 32 columns. Outputs have the dtype of x.
    """

    low_rank: LowRank | None  # an adapter; fastllm.nn.lora sets it

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None, activation: str, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        check_activation(activation, packed.format)
        self.in_features, self.out_features = packed.k, packed.n
        self.activation = activation
        self._hold(packed, dtype)
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))
        self.low_rank = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str,
        activation: str = "bf16",
        importance: Tensor | None = None,
    ) -> QuantLinear:
        """Quantize a layer, which stays as it is; its bias is shared.

        Args:
            linear: any device.
            format: a name or alias of `fastllm.ops.quant_format`.
            activation: see the class.
            importance: `[in_features]`, how much errors in each column count.

        Raises:
            ValueError: if rows do not fit the format (`fastllm.ops.quant_format.fit` names one
                that they do), or the weight is empty or holds NaN or infinity.
        """
        weight, kind = linear.weight.detach(), format_of(format)
        if weight.shape[1] % kind.multiple:
            raise ValueError(
                f"in_features {weight.shape[1]} is no multiple of {kind.multiple}, as "
                f"{kind.name} needs; fit({kind.name!r}, {weight.shape[1]}) names a format that fits"
            )
        packed = quantize_weight(weight, kind.name, importance, weight.device)
        made = cls(packed, linear.bias, activation, weight.dtype)
        return made.train(linear.training)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None = None,
        activation: str = "bf16",
        dtype: torch.dtype = torch.bfloat16,
    ) -> QuantLinear:
        """A layer of a packed weight, whose memory it takes over; `dtype` is that of `weight`."""
        return cls(packed, bias, activation, dtype)

    def dequantize(self) -> nn.Linear:
        """A plain layer of the same values in `dtype`, frozen; the bias is shared."""
        plain = nn.Linear(self.in_features, self.out_features, False, device="meta")
        plain.weight = nn.Parameter(self.weight.dequantize(), requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)

    # the product

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x."""
        if self.low_rank is None and not torch.is_grad_enabled() and is_eager(input):
            quick = self._quick_product()
            if quick is not None and input.dtype in quick.dtypes and input.is_cpu:
                return quick(input)
        return self.with_term(input, self.low_rank)

    def with_term(self, input: Tensor, low_rank: LowRank | None) -> Tensor:
        """`forward` with that adapter instead of the layer's own.

        Its factors have the dtype that `compute_dtype_of` gives for the input.
        """
        if low_rank is not None and low_rank.enabled and not torch.is_grad_enabled():
            quick = self._quick_product() if is_eager(input) and input.is_cpu else None
            if quick is not None and input.dtype in quick.dtypes:
                a, b = low_rank.a.weight, low_rank.b.weight
                if _usual(a, input.dtype) and _usual(b, input.dtype):
                    return quick.with_term(input, a, b, low_rank.scale)
        if not input.is_floating_point():
            raise ValueError(f"input must be floating-point, got {input.dtype}")
        given, dtype = input.dtype, compute_dtype_of(self.activation, input.dtype)
        x = input if given == dtype else input.to(dtype)
        if low_rank is None or not low_rank.enabled:
            y = self.product(x, None if dtype == given else torch.float32)
        elif torch.is_grad_enabled() and not low_rank.drops and not _trained(self.bias):
            y = trained_products(x, self.frozen_base(), [low_rank])[0]
        else:
            y = low_rank(x, self.product(x, torch.float32), dtype)
        return y if y.dtype == given else y.to(given)

    def _quick_product(self) -> BoundProduct | None:
        """The product of the weight where it lies now, without checks; None: there is none such."""
        parameters: dict[str, Any] = self._parameters
        codes, scales = parameters["weight_codes"], parameters["weight_scales"]
        bias = parameters["bias"]
        known: _Bound | None = self.__dict__.get("_bound")
        if known is None or not known.serves(codes, scales, bias, self.activation):
            known = _Bound.of(self, codes, scales, bias)
            self.__dict__["_bound"] = known
        return known.product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.__dict__.pop("_bound", None)  # holds the memory that the codes may leave
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_bound"}

    @property
    def compute_dtype(self) -> torch.dtype:
        """What inputs of the layer's own dtype are multiplied in."""
        return compute_dtype_of(self.activation, self.dtype)

    def product(self, x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
        """x W^T + b without adapter; x in `compute_dtype`, the result in out_dtype or x's."""
        packed = self.packed_weight()
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype not in (torch.bfloat16, torch.float32):
            bias = bias.float()
        mode = QUANT_FORMATS[self.format].mode(self.activation)
        return quant_matmul(
            x, packed.data, packed.scales, self.format, packed.n, bias, mode, out_dtype
        )

    def frozen_base(self) -> FrozenBase:
        """The product and its gradient, for adapters that are recorded with it."""

        def gradient(grads: Any) -> Tensor:
            packed = self.packed_weight()
            return packed_input_grad(
                grads[0], packed.data, packed.scales, self.format, packed.n, packed.k
            )

        return FrozenBase(lambda x: [self.product(x, torch.float32)], gradient)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, activation={self.activation}"
        )


class _Bound(NamedTuple):
    """A product, and what it was made from: views of parameters cost as much as small products."""

    product: BoundProduct | None
    codes: Tensor
    addresses: tuple[int, int]
    bias: Tensor | None
    of_bias: tuple[torch.dtype, bool] | None
    activation: str

    def serves(self, codes: Tensor, scales: Tensor, bias: Tensor | None, activation: str) -> bool:
        """Whether nothing was moved or replaced since."""
        return (
            self.codes is codes
            and self.bias is bias
            and self.of_bias == _kind(bias)
            and self.activation == activation
            and (self.product is None or self.addresses == (codes.data_ptr(), scales.data_ptr()))
        )

    @classmethod
    def of(cls, layer: QuantLinear, codes: Tensor, scales: Tensor, bias: Tensor | None) -> _Bound:
        """Of the layer as it is now."""
        if is_sharded(codes) or not codes.is_cpu:
            return cls(None, codes, (0, 0), bias, _kind(bias), layer.activation)
        packed = layer.packed_weight()
        mode = QUANT_FORMATS[layer.format].mode(layer.activation)
        product = bound_product(packed.data, packed.scales, layer.format, packed.n, bias, mode)
        addresses = codes.data_ptr(), scales.data_ptr()
        return cls(product, codes, addresses, bias, _kind(bias), layer.activation)


def _kind(bias: Tensor | None) -> tuple[torch.dtype, bool] | None:
    """What decides whether the native product takes a bias: its `data` may be another by now."""
    return None if bias is None else (bias.dtype, bias.is_contiguous())


def check_activation(activation: str, format: str) -> None:
    """Raise ValueError unless a `QuantLinear` of that format can have that activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    kind = QUANT_FORMATS[format]
    if kind.mode(activation) not in kind.modes:
        raise ValueError(f"activation {activation!r} is none of {format}'s")


def kernel_dtype_of(given: torch.dtype) -> torch.dtype:
    """`given` where kernels take and give it, else float32."""
    return given if given in (torch.bfloat16, torch.float32) else torch.float32


def compute_dtype_of(activation: str, given: torch.dtype) -> torch.dtype:
    """What inputs of dtype `given` are multiplied in."""
    return _COMPUTE.get(activation, kernel_dtype_of(given))


def _usual(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether native kernels read an adapter's factor as it lies."""
    plain = type(factor) is nn.Parameter or type(factor) is Tensor
    return plain and factor.is_cpu and factor.dtype == dtype and factor.stride(-1) == 1


def _trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def _as_parameter(bias: Tensor) -> nn.Parameter:
    return bias if isinstance(bias, nn.Parameter) else frozen(bias)
