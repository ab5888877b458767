"""`QuantLinear`: a linear layer of PyTorch whose weight is packed, for models that others define.

It is an `nn.Linear` to whoever asks: adapters of PEFT go on it, FSDP2 shards it, `state_dict` saves
it. It holds one form of the weight, the layout of its device, as two frozen parameters of bytes:
casts leave them alone, and FSDP2 divides them among processes as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.nn.low_rank import FrozenBase, LowRank, trained_products
from fastllm.nn.quantized_values import REMEDY, QuantizedValues
from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import QUANT_FORMATS, format_of
from fastllm.ops.quant_matmul import ACTIVATIONS, quant_matmul
from fastllm.ops.quant_matmul_input_grad import packed_input_grad
from fastllm.quantize.packed import (
    PackedWeight,
    canonical,
    from_canonical,
    quantize_weight,
)

_COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PARTS = ("weight_codes", "weight_scales")
_INTERLEAVED = {1, *layout.ROWS_PER_GROUP.values()}  # rows that layouts put side by side
_Shape = tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]


class QuantLinear(nn.Linear):
    """y = x W^T + b with a quantized W; differentiable in x and b, W is frozen.

    `weight_codes` and `weight_scales` are the packed weight's bytes, a row for each group of rows
    that its device interleaves. `state_dict` holds them under the same names with one row for each
    output feature, whatever the device, and `weight_format`, the name of the format in ASCII.
    `weight` shows the dequantized values, read only.

    activation: how inputs meet the codes: "bf16" and "fp32" round x to that dtype, "int8" to 8 bits
        for every 32 columns. Outputs have the dtype of x.
    """

    weight_codes: nn.Parameter
    weight_scales: nn.Parameter
    weight_format: Tensor
    low_rank: LowRank | None  # an adapter; fastllm.nn.lora sets it

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None, activation: str, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        if packed.format in layout.DENSE:
            raise ValueError(f"format {packed.format!r} is not quantized: keep nn.Linear")
        check_activation(activation, packed.format)
        self.in_features, self.out_features = packed.k, packed.n
        self.format, self.activation, self.dtype = packed.format, activation, dtype
        self._shapes = _shapes(packed.format, packed.n, packed.k)
        self.weight_codes = _frozen(_as_bytes(packed.data))
        self.weight_scales = _frozen(_as_bytes(packed.scales))
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))
        name = torch.tensor(list(packed.format.encode()), dtype=torch.uint8)
        self.register_buffer("weight_format", name.to(packed.device))
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
                that they do), or the weight holds NaN or infinity.
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

    # the weight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values in `dtype`, dequantized when they are read; writing to them raises."""
        device = self.weight_codes.device
        shape = (self.out_features, self.in_features)
        return QuantizedValues(self.packed_weight, shape, self.dtype, device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise RuntimeError(REMEDY)
        super().__setattr__(name, value)

    def packed_weight(self) -> PackedWeight:
        """The weight as kernels read it; it shares this memory.

        Raises RuntimeError if FSDP2 has it sharded now.
        """
        if _is_sharded(self.weight_codes):
            raise RuntimeError(
                "the codes are sharded among processes: they are whole inside a forward of the "
                "module that fully_shard was called on, or after its unshard()"
            )
        return self._packed(self.weight_codes, self.weight_scales)

    def dequantize(self) -> nn.Linear:
        """A plain layer of the same values in `dtype`, frozen; the bias is shared."""
        plain = nn.Linear(self.in_features, self.out_features, False, device="meta")
        plain.weight = nn.Parameter(self.weight.dequantize(), requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)

    def _packed(self, codes: Tensor, scales: Tensor) -> PackedWeight:
        n, k, format = self.out_features, self.in_features, self.format
        data, dtype, records = self._shapes[codes.shape[1]]
        return PackedWeight(codes.view(data), scales.view(dtype).view(records), format, n, k)

    # the product

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x."""
        dtype = self._dtype_of(input.dtype)
        x = input if input.dtype == dtype else input.to(dtype)
        low_rank = self.low_rank
        if low_rank is None or not low_rank.enabled:
            y = self._product(x, None if x.dtype == input.dtype else torch.float32)
        elif torch.is_grad_enabled() and not low_rank.drops and not _trained(self.bias):
            y = trained_products(x, self._frozen_base(), [low_rank])[0]
        else:
            y = low_rank(x, self._product(x, torch.float32), x.dtype)
        return y if y.dtype == input.dtype else y.to(input.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What inputs of the layer's own dtype are multiplied in."""
        return self._dtype_of(self.dtype)

    def _dtype_of(self, given: torch.dtype) -> torch.dtype:
        own = _COMPUTE.get(self.activation)
        if own is not None:
            return own
        return given if given in (torch.bfloat16, torch.float32) else torch.float32

    def _product(self, x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
        packed = self.packed_weight()
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype not in (torch.bfloat16, torch.float32):
            bias = bias.float()
        mode = QUANT_FORMATS[self.format].mode(self.activation)
        return quant_matmul(
            x, packed.data, packed.scales, self.format, packed.n, bias, mode, out_dtype
        )

    def _frozen_base(self) -> FrozenBase:
        def gradient(grads: Any) -> Tensor:
            packed = self.packed_weight()
            return packed_input_grad(
                grads[0], packed.data, packed.scales, self.format, packed.n, packed.k
            )

        return FrozenBase(lambda x: [self._product(x, torch.float32)], gradient)

    # moves and files

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device))
        self.dtype = probe.dtype
        if _is_sharded(self.weight_codes):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        rows = _interleaved(self.format, self.in_features, self.weight_codes.shape[1])
        wanted = layout.ROWS_PER_GROUP.get(probe.device.type, rows)
        if wanted != rows:
            codes, scales = self._in_layout_of(probe.device, wanted)
            self.weight_codes, self.weight_scales = _frozen(codes), _frozen(scales)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _in_layout_of(self, device: torch.device, rows: int) -> tuple[Tensor, Tensor]:
        """Codes and scales as bytes on `device`, in its layout; of a layer on meta only memory."""
        n, k = self.out_features, self.in_features
        if self.weight_codes.is_meta:
            codes, scales = (
                torch.empty(-(-n // rows), width * rows, dtype=torch.uint8, device=device)
                for width in self._row_bytes()
            )
            return codes, scales
        data, scales = canonical(self.packed_weight())
        packed = from_canonical(self.format, data, scales, n, k, device)
        return _as_bytes(packed.data), _as_bytes(packed.scales)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        codes = self.weight_codes
        if not _is_sharded(codes) and not codes.is_meta:  # a part of it stays as it is
            for name, part in zip(_PARTS, canonical(self.packed_weight()), strict=True):
                destination[prefix + name] = _as_bytes(part)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: t for name, t in state_dict.items() if name.startswith(prefix)}
        problem = self._problem(given, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        codes, scales = (given.get(prefix + name) for name in _PARTS)
        if codes is not None and scales is not None and not _is_sharded(codes):
            packed = self._packed(codes.contiguous(), scales.contiguous())
            parts = canonical(packed)
            if not _is_sharded(self.weight_codes):
                device = self.weight_codes.device
                device = torch.device("cpu") if device.type == "meta" else device
                packed = from_canonical(self.format, *parts, packed.n, packed.k, device)
                parts = packed.data, packed.scales
            given |= {prefix + n: _as_bytes(t) for n, t in zip(_PARTS, parts, strict=True)}
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _problem(self, given: Mapping[str, Any], prefix: str) -> str | None:
        """What is wrong with entries of a state dict; None: nothing but what torch will name."""
        if f"{prefix}weight" in given:
            return (
                f"{prefix}weight is a plain weight and this layer is {self.format}: load it into "
                "the plain model, then call fastllm.quantize_model"
            )
        name = given.get(f"{prefix}weight_format")
        if name is not None:
            stored = bytes(name.flatten().tolist()).decode("ascii", "replace")
            if stored != self.format:
                return (
                    f"{prefix}weight_format is {stored!r:.40} and this layer is {self.format!r}: "
                    f"quantize the model to {stored!r:.40} before loading"
                )
        missing = [part for part in _PARTS if prefix + part not in given]
        if len(missing) == 1:
            return f"{prefix}{missing[0]} is missing: {' and '.join(_PARTS)} belong together"
        n = self.out_features
        for part, width in zip(_PARTS, self._row_bytes(), strict=True):
            t = given.get(prefix + part)
            if t is None or _is_sharded(t):
                continue
            # Parts that FSDP2 has put together again still interleave the rows of their device.
            shapes = {(-(-n // rows), rows * width) for rows in _INTERLEAVED}
            if t.dtype != torch.uint8 or tuple(t.shape) not in shapes:
                return (
                    f"{prefix}{part} must be uint8 [{n}, {width}] for a {self.format} weight of "
                    f"{n} x {self.in_features}, got {t.dtype} {list(t.shape)}"
                )
        return None

    def _row_bytes(self) -> tuple[int, int]:
        """Bytes of a row's codes and scales."""
        k = self.in_features
        codes = torch.Size(layout.data_shape(self.format, 1, k, 1)).numel()
        return codes, format_of(self.format).scale_bytes(k)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, activation={self.activation}"
        )


def check_activation(activation: str, format: str) -> None:
    """Raise ValueError unless a `QuantLinear` of that format can have that activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    kind = QUANT_FORMATS[format]
    if kind.mode(activation) not in kind.modes:
        raise ValueError(f"activation {activation!r} is none of {format}'s")


def _is_sharded(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # 519 modules, which generation never needs

    return isinstance(tensor, DTensor)


def _trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def _frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def _as_parameter(bias: Tensor) -> nn.Parameter:
    return bias if isinstance(bias, nn.Parameter) else _frozen(bias)


def _as_bytes(part: Tensor) -> Tensor:
    """uint8 [groups of rows, bytes]."""
    flat = part.contiguous().view(-1).view(torch.uint8)
    return flat.view(part.shape[0], part.nbytes // max(part.shape[0], 1))


def _interleaved(format: str, k: int, width: int) -> int:
    """How many rows of k columns lie in `width` bytes of codes."""
    one = torch.Size(layout.data_shape(format, 1, k, 1)).numel()
    return max(width // max(one, 1), 1)


def _shapes(format: str, n: int, k: int) -> dict[int, _Shape]:
    """By the bytes of codes in a group of rows, for every device: shape of the data, dtype and
    shape of the scales.
    """
    one = torch.Size(layout.data_shape(format, 1, k, 1)).numel()
    dtype = layout.scales_dtype(format)
    return {
        rows * one: (
            layout.data_shape(format, n, k, rows), dtype, layout.scales_shape(format, n, k, rows)
        )
        for rows in _INTERLEAVED
    }  # fmt: skip
