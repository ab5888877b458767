"""Packed modules in transformers models: linear layers, embeddings, and a mixture's experts.

Linear layers and embeddings are `fastllm.nn.QuantLinear` and `QuantEmbedding`. `QuantExperts` takes
the place of the module in which transformers stacks all experts of a layer.

A model that waits for its files holds them on meta, in the files' layout of one row a group;
`to_device_layout` brings what was read into the layout that kernels read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.nn.packed_matrix import PackedMatrix, as_bytes, frozen
from fastllm.nn.quant_linear import check_activation, compute_dtype_of, kernel_dtype_of
from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import format_of
from fastllm.ops.quant_moe import quant_moe
from fastllm.quantize import packed_experts as packing
from fastllm.quantize.packed import PackedWeight, rows_per_group
from fastllm.quantize.packed_experts import PackedExperts

from .experts import is_parallel

EXPERT_PARTS = ("gate_up_proj", "down_proj")
# What others read of an experts module: routers, expert parallelism, fastllm's own parts.
_KEPT = (
    "num_experts", "hidden_dim", "intermediate_dim", "act_fn", "has_gate", "has_bias",
    "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel",
)  # fmt: skip


class QuantExperts(nn.Module):
    """The experts of a layer with packed weights: differentiable in its inputs, frozen itself.

    `gate_up_proj_codes`, `gate_up_proj_scales`, `down_proj_codes` and `down_proj_scales` are bytes,
    uint8 [E, groups of rows, bytes of a group] as `PackedMatrix` has them; `state_dict` holds them
    with one row a group.

    experts: the module whose place it takes. gate_up, down: [E, 2 I, H] and [E, H, I].
    activation: as of `QuantLinear`. gating: the activation of `fastllm.ops.quant_moe`.
    """

    gate_up_proj_codes: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self, experts: Any, gate_up: PackedExperts, down: PackedExperts, activation: str,
        gating: str, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        for packed in (gate_up, down):
            check_activation(activation, packed.format)
        self.original, self.config = type(experts), experts.config
        for name in _KEPT:
            if hasattr(experts, name):
                setattr(self, name, getattr(experts, name))
        for name in (f"{part}_bias" for part in EXPERT_PARTS):
            self.register_parameter(name, getattr(experts, name, None))
        self.activation, self.gating, self.dtype = activation, gating, dtype
        self.formats = gate_up.format, down.format
        self.inner = down.k
        self._sizes = (gate_up.n, gate_up.k), (down.n, down.k)
        for part, packed in zip(EXPERT_PARTS, (gate_up, down), strict=True):
            self._set(part, packed)
        self.train(experts.training)

    def packed(self, part: str) -> PackedExperts:
        """What is packed of "gate_up_proj" or "down_proj"; it shares this memory."""
        codes: Tensor = getattr(self, f"{part}_codes")
        scales: Tensor = getattr(self, f"{part}_scales")
        index = EXPERT_PARTS.index(part)
        format, (n, k) = self.formats[index], self._sizes[index]
        rows = codes.shape[2] // max(layout.code_bytes(format, k), 1)
        count = codes.shape[0]
        data = codes.view(count, *layout.data_shape(format, n, k, rows))
        typed = scales.view(layout.scales_dtype(format))
        return PackedExperts(
            data, typed.view(count, *layout.scales_shape(format, n, k, rows)), format, n, k
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], ids [T, K] and weights [T, K] -> [T, H] in the dtype of hidden_states.

        In an expert-parallel layer ids of other ranks' experts contribute nothing.
        """
        gate_up, down = (self.packed(part).parts for part in EXPERT_PARTS)
        given = hidden_states.dtype
        if not hidden_states.is_floating_point():
            raise ValueError(f"hidden_states must be floating-point, got {given}")
        x = hidden_states.to(compute_dtype_of(self.activation, given))
        y = quant_moe(
            x, gate_up, down, self.inner, top_k_index.int(),
            top_k_weights.float(), gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias, activation=self.gating, mode=self.activation,
            first_expert=0 if is_parallel(self) else None,
            out_dtype=kernel_dtype_of(given),
        )  # fmt: skip
        return y.to(given)

    def dequantize(self) -> nn.Module:
        """The module of transformers with the dequantized values in `dtype`, frozen."""
        with torch.device("meta"):
            plain = self.original(self.config)
        for part in EXPERT_PARTS:
            setattr(plain, part, frozen(packing.unpack(self.packed(part)).to(self.dtype)))
            if getattr(self, f"{part}_bias") is not None:
                setattr(plain, f"{part}_bias", getattr(self, f"{part}_bias"))
        return plain.train(self.training)

    def _set(self, part: str, packed: PackedExperts) -> None:
        for name, tensor in (("codes", packed.data), ("scales", packed.scales)):
            setattr(self, f"{part}_{name}", frozen(expert_bytes(tensor)))

    def to_device_layout(self, device: torch.device) -> None:
        """Bring codes and scales into the layout that the kernels of `device` read."""
        rows = rows_per_group(device)
        for index, part in enumerate(EXPERT_PARTS):
            packed = self.packed(part)
            k = self._sizes[index][1]
            width = rows * layout.code_bytes(packed.format, k)
            if getattr(self, f"{part}_codes").shape[2] == width:
                continue
            parts = packing.canonical(packed)
            self._set(part, packing.from_canonical(packed.format, *parts, packed.n, k, device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        codes: Tensor = self.gate_up_proj_codes
        probe = fn(torch.empty(0, dtype=self.dtype, device=codes.device))
        self.dtype = probe.dtype
        moved = probe.device.type != codes.device.type
        if moved and not codes.is_meta and not probe.is_meta:
            self.to_device_layout(probe.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        for part in EXPERT_PARTS:
            if getattr(self, f"{part}_codes").is_meta:
                continue
            for name, tensor in zip(
                ("codes", "scales"), packing.canonical(self.packed(part)), strict=True
            ):
                destination[f"{prefix}{part}_{name}"] = expert_bytes(tensor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        given = dict(state_dict)
        for index, part in enumerate(EXPERT_PARTS):
            names = [f"{prefix}{part}_{name}" for name in ("codes", "scales")]
            if not all(name in given for name in names):
                continue
            codes, scales = (given[name] for name in names)
            format, (n, k) = self.formats[index], self._sizes[index]
            usual = len(codes), n, layout.code_bytes(format, k)
            if codes.dtype == torch.uint8 and tuple(codes.shape) == usual:
                packed = _from_bytes(format, codes, scales, n, k)
                held: Tensor = getattr(self, f"{part}_codes")
                device = torch.device("cpu") if held.is_meta else held.device
                parts = packed.data, packed.scales
                made = packing.from_canonical(format, *parts, n, k, device)
                given[names[0]], given[names[1]] = (
                    expert_bytes(made.data), expert_bytes(made.scales)
                )  # fmt: skip
        super()._load_from_state_dict(given, prefix, *rest)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return (
            f"{self.gate_up_proj_codes.shape[0]}, hidden={self._sizes[0][1]}, inner={self.inner}, "
            f"formats={'/'.join(self.formats)}, activation={self.activation}"
        )


def meta_weight(format: str, n: int, k: int, rows: int = 1) -> PackedWeight:
    """A weight on meta, which a module holds until files are read.

    rows: side by side in the layout; files have one.

    Raises ValueError if rows of k columns do not fit the format.
    """
    _check_columns(format, k)
    with torch.device("meta"):
        data = torch.empty(layout.data_shape(format, n, k, rows), dtype=torch.uint8)
        scales = torch.empty(
            layout.scales_shape(format, n, k, rows), dtype=layout.scales_dtype(format)
        )
    return PackedWeight(data, scales, format, n, k)


def meta_experts(format: str, count: int, n: int, k: int, rows: int = 1) -> PackedExperts:
    """As `meta_weight`, of all experts of a layer."""
    one = meta_weight(format, n, k, rows)
    data, scales = (t.expand(count, *t.shape).contiguous() for t in (one.data, one.scales))
    return PackedExperts(data, scales, format, n, k)


def to_device_layout(module: nn.Module) -> None:
    """Bring a packed module that was filled from files into the layout of its device."""
    if isinstance(module, PackedMatrix):
        module._apply(lambda tensor: tensor)
    elif isinstance(module, QuantExperts):
        module.to_device_layout(module.gate_up_proj_codes.device)


def _check_columns(format: str, k: int) -> None:
    kind = format_of(format)
    if k % kind.multiple:
        raise ValueError(f"rows of {k} columns are no multiple of {kind.multiple}, as {format} has")


def expert_bytes(tensor: Tensor) -> Tensor:
    """uint8 [E, groups of rows, bytes]."""
    flat = as_bytes(tensor.flatten(0, 1))
    return flat.view(tensor.shape[0], tensor.shape[1], -1)


def _from_bytes(format: str, codes: Tensor, scales: Tensor, n: int, k: int) -> PackedExperts:
    count = codes.shape[0]
    data = codes.contiguous().view(count, *layout.data_shape(format, n, k, 1))
    typed = scales.contiguous().view(layout.scales_dtype(format))
    shape = layout.scales_shape(format, n, k, 1)
    return PackedExperts(data, typed.view(count, *shape), format, n, k)
