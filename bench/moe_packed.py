"""Packed experts in suite `moe`: beside the same experts in bfloat16, ours and torch's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllm import ops
from fastllm.bench import moe_layers as layers
from fastllm.bench.moe_layers import Inputs, Shape
from fastllm.ops.pages import Arena
from fastllm.quantize.gguf_blocks import row_bytes
from fastllm.quantize.packed_experts import PackedExperts, pack_experts
from fastllm.testing.suite import OURS, Settings, Work
from fastllm.testing.timing import rotation

Draw = tuple[Inputs, PackedExperts, PackedExperts]


def packed_bytes(shape: Shape, format: str) -> int:
    """Of one expert."""
    if format == "bf16":
        return shape.expert_bytes
    up = 2 * shape.inner * row_bytes(format, shape.hidden)
    return up + shape.hidden * row_bytes(format, shape.inner)


def packed_work(shape: Shape, format: str, settings: Settings) -> Work:
    """int8 activations on packed experts, other tokens and other weights in every call.

    Of "bf16" the same panels that a loaded model has, with bfloat16 activations.
    """
    mode = "bf16" if format == "bf16" else "int8"
    size = shape.experts * packed_bytes(shape, format)
    seeds, device = iter(range(4096)), settings.device
    packed = rotation(lambda: _draw(shape, format, device, next(seeds)), size)
    dense = rotation(
        lambda: layers.draw(shape, device, next(seeds)), shape.experts * shape.expert_bytes
    )
    active = sum(next(packed)[0].active for _ in range(8)) / 8

    def ours() -> Tensor:
        inputs, up, down = next(packed)
        with torch.no_grad():
            return ops.quant_moe(
                inputs.x, up.parts, down.parts, shape.inner, inputs.ids, inputs.weights, mode=mode
            )

    def other(function: layers.Function) -> Tensor:
        inputs = next(dense)
        with torch.no_grad():
            return function(*inputs.leaves, inputs.ids)

    functions: dict[str, Any] = {OURS: ours, "fastllm bf16": partial(other, layers.ours)}
    functions["grouped_mm"] = partial(other, layers.composed)
    return Work(
        functions=functions,
        nbytes=active * packed_bytes(shape, format),
        flops=shape.flops,
        kind=mode,
    )


def _draw(shape: Shape, format: str, device: str, seed: int) -> Draw:
    # The dense weights of the draw are let go. Rows of one byte: timing depends on no value. They
    # lie in huge pages, as a loaded model's.
    few = Shape(shape.name, shape.tokens, shape.hidden, 1, shape.experts, shape.k, shape.load)

    arena = Arena()

    def pack(rows: int, columns: int) -> PackedExperts:
        width = 2 * columns if format == "bf16" else row_bytes(format, columns)
        values = torch.full((shape.experts, rows, width), 60, dtype=torch.uint8)
        if format == "bf16":
            values = values.view(torch.bfloat16)
        return pack_experts(format, values, device, arena)

    up, down = pack(2 * shape.inner, shape.hidden), pack(shape.hidden, shape.inner)
    return layers.draw(few, device, seed), up, down
