"""Linear layers over plain or packed weights.

A layer owns its weight as a parameter in Hugging Face layout [out, in], or, in inference loads, as
a `PackedWeight` alone. With both, the packed form is a cache of the parameter: it is never saved,
serves where no gradient is recorded, and whoever changes the parameter calls `pack_()` afterwards
(of a whole model: `Decoder.weights_changed()`). Both forms give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastllm.nn.low_rank import FrozenBase, LowRank, trained_products, without_term
from fastllm.ops.linear import linear
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.quant_matmul import quant_matmul
from fastllm.ops.quant_matmul_input_grad import packed_input_grad
from fastllm.quantize.packed import PackedWeight, pack, repack_


class Linear(nn.Module):
    """y = x W^T + b. `activation` ("int8", "bf16", "fp32") is how inputs meet quantized weights."""

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        weight = torch.empty(out_features, in_features, device="meta")
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False)
        self.packed: PackedWeight | None = None
        self.low_rank: LowRank | None = None  # an adapter; fastllm.nn.lora sets it

    def pack_(self) -> None:
        """Make the packed cache from the parameter; one that is there is written in place."""
        if self.weight is None:
            raise ValueError("this layer holds a packed weight alone: there is nothing to pack")
        self.packed = pack_parameter(self.weight, self.packed)

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [..., in] -> [..., out] in `out_dtype` or the dtype of x."""
        if self.low_rank is None or not self.low_rank.enabled:
            return self.product(x, out_dtype)
        if trains_adapters_alone([self], x) and out_dtype in (None, x.dtype):
            return trained_products(x, frozen_base([self]), [self.low_rank])[0]
        return self.low_rank(x, self.product(x, torch.float32), out_dtype or x.dtype)

    def product(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """`forward` without the adapter."""
        if self.packed is not None and not records(x, self.weight):
            return packed_product(x, self.packed, self.bias, self.activation, out_dtype)
        assert self.weight is not None, "a loader sets the weight or packs it"
        return linear(x, self.weight, self.bias, out_dtype)

    def extra_repr(self) -> str:
        kind = "parameter" if self.packed is None else self.packed.format
        return f"{self.in_features}, {self.out_features}, {kind}"


class DenseLinear(Linear):
    """A linear layer whose weight stays a plain tensor, because others read it in other shapes."""

    def pack_(self) -> None:
        """Nothing: there is no packed cache."""


class ParallelLinear:
    """Linears of one input as one product: q, k and v, or gate and up.

    The members stay the owners of parameters and names; this is not a module and saves nothing.
    Once `packed` is set the members' own packed weights are not needed.
    """

    def __init__(self, members: Sequence[Linear], names: Sequence[str]) -> None:
        self.members = tuple(members)
        self.names = tuple(names)  # of the members in their module
        self.sizes = [m.out_features for m in members]
        self.packed: PackedWeight | None = None
        self.bias: Tensor | None = None

    def pack_(self) -> None:
        """Make one packed weight from the members' parameters; one there is written in place."""
        weights = [m.weight for m in self.members if m.weight is not None]
        if len(weights) != len(self.members):
            raise ValueError("a member holds a packed weight alone: there is nothing to pack")
        rows = torch.cat([w.detach() for w in weights])
        self.set_packed(pack_parameter(rows, self.packed))

    def set_packed(self, packed: PackedWeight) -> None:
        """Serve the product from `packed`, the members' rows one after another."""
        self.packed = packed
        if all(m.bias is None for m in self.members):
            self.bias = None
            return
        bias = torch.cat([
            torch.zeros(m.out_features, dtype=torch.float32, device=packed.data.device)
            if m.bias is None else m.bias.detach().float() for m in self.members
        ])  # fmt: skip
        if self.bias is None:
            self.bias = bias
        else:
            self.bias.copy_(bias)  # in place: captured graphs hold it

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """One output [..., size] per member: views of one product if they are packed together."""
        if trains_adapters_alone(self.members, x):
            whole = any(member.weight is None for member in self.members)
            base = self._frozen_base() if self.packed is not None and whole else None
            low_ranks = [active(member) for member in self.members]
            return trained_products(x, base or frozen_base(self.members), low_ranks)
        if self.packed is None or any(records(x, member.weight) for member in self.members):
            return [member(x) for member in self.members]
        low_ranks = [active(m) for m in self.members]
        adapted = any(low_rank is not None for low_rank in low_ranks)
        dtype = torch.float32 if adapted else None
        y = packed_product(x, self.packed, self.bias, self.members[0].activation, dtype)
        parts = y.split(self.sizes, dim=-1)
        if not adapted:
            return parts
        return [
            without_term(part, x.dtype) if low_rank is None else low_rank(x, part, x.dtype)
            for low_rank, part in zip(low_ranks, parts, strict=True)
        ]

    def _frozen_base(self) -> FrozenBase:
        packed, activation = self.packed, self.members[0].activation
        assert packed is not None, "asked for where the members are packed together"
        return FrozenBase(
            lambda x: packed_product(x, packed, self.bias, activation, torch.float32).split(
                self.sizes, dim=-1
            ),
            lambda grads: input_gradient(torch.cat(list(grads), dim=-1), packed),
        )


def active(layer: Linear) -> LowRank | None:
    """The layer's adapter, if it has one and it is switched on."""
    low_rank = layer.low_rank
    return low_rank if low_rank is not None and low_rank.enabled else None


def trains_adapters_alone(layers: Sequence[Linear], x: Tensor) -> bool:
    """Whether gradients are recorded for adapters of these layers and for nothing of their base."""
    low_ranks = [low_rank for low_rank in map(active, layers) if low_rank is not None]
    return (
        bool(low_ranks)
        and torch.is_grad_enabled()
        and not any(low_rank.drops for low_rank in low_ranks)
        and not any(
            p is not None and p.requires_grad
            for layer in layers
            for p in (layer.weight, layer.bias)
        )
    )


def frozen_base(layers: Sequence[Linear]) -> FrozenBase:
    """Layers of one input, each with a product of its own, from the plain form where there is one.

    (A packed cache of a parameter may be stale where gradients are recorded.)
    """

    def product(layer: Linear, x: Tensor) -> Tensor:
        if layer.weight is not None:
            return linear(x, layer.weight, layer.bias, torch.float32)
        assert layer.packed is not None, "a loader sets the weight or packs it"
        return packed_product(x, layer.packed, layer.bias, layer.activation, torch.float32)

    def gradient(grads: Sequence[Tensor]) -> Tensor:
        total: Tensor | None = None
        for layer, grad in zip(layers, grads, strict=True):
            if layer.weight is None:
                assert layer.packed is not None, "a loader sets the weight or packs it"
                part = input_gradient(grad, layer.packed)
            else:
                part = grad @ layer.weight
            total = part if total is None else total.add_(part)
        assert total is not None, "there is a layer"
        return total

    return FrozenBase(lambda x: [product(layer, x) for layer in layers], gradient)


def input_gradient(grad: Tensor, packed: PackedWeight) -> Tensor:
    """grad [..., N] times a packed weight [N, K]."""
    return packed_input_grad(grad, packed.data, packed.scales, packed.format, packed.n, packed.k)


def packed_product(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
    *,
    gated: str = "",
) -> Tensor:
    """x [..., K] times a packed weight [N, K], plus bias; `gated` as of `quant_matmul`."""
    mode = QUANT_FORMATS[packed.format].mode(activation)
    return quant_matmul(
        x, packed.data, packed.scales, packed.format, packed.n, bias, mode, out_dtype, None, gated
    )


def records(x: Tensor, weight: Tensor | None) -> bool:
    """Whether autograd records a product of x and a parameter, which it does in the plain form."""
    return (
        weight is not None and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    )


def pack_parameter(weight: Tensor, cache: PackedWeight | None = None) -> PackedWeight:
    """Pack a [out, in] float32 or bfloat16 tensor for its own device.

    cache: an earlier pack, which is written in place and returned if it fits.
    """
    format = "f32" if weight.dtype == torch.float32 else "bf16"
    rows, columns = weight.shape
    if cache is not None and (cache.format, cache.n, cache.k, cache.device) == (
        format, rows, columns, weight.device,
    ):  # fmt: skip
        repack_(cache, weight.detach())
        return cache
    return pack(format, weight.detach(), rows, columns, weight.device)
