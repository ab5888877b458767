"""What a quantized layer is called and looks like in the file that is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import file_name, holds_experts, members, stacks, to_files
from fastllm.models.gguf_export import gguf_name, row_order
from fastllm.models.hf_layout import in_file_order
from fastllm.ops.quant_format import format_of
from fastllm.quantize import bitsandbytes_files, compressed_tensors, fastllm_files
from fastllm.quantize.coded import CodedWeight, coded
from fastllm.quantize.mixes import Plan
from fastllm.quantize.packed import PackedWeight, canonical, gguf_rows

Named = Iterator[tuple[str, str, Tensor]]  # (name in the file, format, data)


class Layout(Protocol):
    """A way to write weights. Names are full Hugging Face names of weights."""

    def packed(self, name: str, weight: PackedWeight) -> Named:
        """A quantized linear layer's or embedding's matrix."""

    def experts(self, name: str, experts: list[list[PackedWeight]]) -> Named:
        """The quantized matrices of all experts of a tensor of the model."""

    def dense(self, name: str, data: Tensor) -> Named:
        """A tensor that is not quantized, as the source has it."""


class GgufLayout:
    """Names, orders of rows and formats of llama.cpp's files."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def packed(self, name: str, weight: PackedWeight) -> Named:
        rows, order = gguf_rows(weight), row_order(self.config, name)
        yield gguf_name(name), weight.format, rows if order is None else rows[order]

    def experts(self, name: str, experts: list[list[PackedWeight]]) -> Named:
        for i, part in enumerate(stacks(name)):
            rows = torch.stack([gguf_rows(packs[i]) for packs in experts])
            yield gguf_name(part), experts[0][i].format, rows

    def dense(self, name: str, data: Tensor) -> Named:
        if holds_experts(name):
            for part, rows in zip(stacks(name), data.chunk(len(stacks(name)), 1), strict=True):
                yield gguf_name(part), "bf16", rows.bfloat16()
            return
        precise = data.dim() == 1 or name.endswith(".mlp.gate.weight")  # llama.cpp wants float32
        values, order = data.float() if precise else data.bfloat16(), row_order(self.config, name)
        format = "f32" if precise else "bf16"
        yield gguf_name(name), format, values if order is None else values[order]


class HfLayout:
    """compressed-tensors where it has the format, bitsandbytes for nf4, else our own tensors."""

    def __init__(self, config: ModelConfig, plan: Plan) -> None:
        self.config, self.plan = config, plan
        formats = set(plan.formats.values())
        if formats == {"nf4"}:
            self.kind = "bitsandbytes"
        elif all(name.startswith(("int4", "int8", "fp8")) for name in formats):
            self.kind = "compressed-tensors"
        else:
            self.kind = "fastllm"

    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of it."""
        formats: dict[str, str] = {}
        for name, format in self.plan.formats.items():
            formats |= dict.fromkeys(self._modules(name), format)
        dense = [m for name in self.plan.dense for m in self._modules(name)]
        heads = [name for name in dense if not name.endswith("embed_tokens")]
        if "lm_head" not in heads:  # tied: others make a layer of it
            heads.append("lm_head")
        if self.kind == "bitsandbytes":
            return bitsandbytes_files.config(tuple(heads))
        if self.kind == "compressed-tensors":
            return compressed_tensors.config(formats, heads)
        return fastllm_files.config(formats)

    def _modules(self, name: str) -> list[str]:
        names = [name]
        if holds_experts(name):
            count = self.config.weight_shapes()[name][0]
            names = [part for expert in range(count) for part in members(name, expert)]
        return [file_name(n, self.config).removesuffix(".weight") for n in names]

    def packed(self, name: str, weight: PackedWeight) -> Named:
        order = _file_order(name, self.config)
        yield from self._module(file_name(name, self.config), weight, order)

    def experts(self, name: str, experts: list[list[PackedWeight]]) -> Named:
        for expert, packs in enumerate(experts):
            for part, weight in zip(members(name, expert), packs, strict=True):
                yield from self._module(file_name(part, self.config), weight, None)

    def _module(self, name: str, weight: PackedWeight, order: Tensor | None) -> Named:
        module = name.removesuffix(".weight")
        if self.kind == "fastllm":
            data, scales = canonical(weight)
            if order is not None:
                data, scales = data[order], scales[order]
            parts = fastllm_files.to_files(data, scales)
        else:
            codes = coded(weight.data, weight.scales, weight.format, weight.n, weight.k)
            if order is not None:
                codes = _in_order(codes, order, name)
            files = bitsandbytes_files if self.kind == "bitsandbytes" else compressed_tensors
            parts = files.to_files(codes)
        for suffix, tensor in parts.items():
            yield f"{module}.{suffix}", "", tensor

    def dense(self, name: str, data: Tensor) -> Named:
        order = _file_order(name, self.config)
        if order is not None:
            data = data[order]
        for own, tensor in to_files({name: data}, self.config).items():
            yield own, "", tensor


def _file_order(name: str, config: ModelConfig) -> Tensor | None:
    """The model's rows in the order of the files, where that is another one."""
    plain = torch.arange(config.weight_shapes()[name][0])
    order = in_file_order(plain, name, config)
    return None if order is plain else order


def _in_order(codes: CodedWeight, order: Tensor, name: str) -> CodedWeight:
    if codes.format == "fp8_block":
        raise ValueError(
            f"{name} is stored with its rows in another order, which would divide the blocks of "
            "fp8_block: use fp8"
        )
    zeros = None if codes.zeros is None else codes.zeros[order]
    return replace(codes, codes=codes.codes[order], scales=codes.scales[order], zeros=zeros)


def stored_bits(formats: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Bits of a quantized value on average, scales included."""
    bits, values = 0.0, 0
    for name, format in formats.items():
        count = 1
        for size in shapes[name]:
            count *= size
        bits += count * format_of(format).bits_per_weight(shapes[name][-1])
        values += count
    return bits / values if values else 0.0
