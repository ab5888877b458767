"""Calls that launch the kernels of packed weights: every format, mode and tile, on meta tensors.

A product is of a Llama 8B layer, 4,096 x 4,096 or, gated, 14,336 wide; input gradients of its
widest weight. 1, 32, 64 and 2,048 tokens take every tile of the tables; all formats meet the
tiles of few and of many tokens, one of each kind of codes and scales those between.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import (
    dequantize,
    embedding,
    quant_activation,
    quant_matmul,
    quant_matmul_input_grad,
    quantize,
)
from .quant_format import FORMATS, kernel_format, modes

KERNEL_FORMATS = tuple(dict.fromkeys(map(kernel_format, FORMATS)))
COVERING = ("q4_1", "q6_k", "q8_0", "int4_asym_g128", "nf4_dq", "fp8_block")
TOKENS = (1, 32, 64, 2048)


def quant_launches() -> dict[str, Callable[[], Any]]:
    """`quant_matmul FORMAT MODE m=TOKENS [gated | fast ...]`, `quant_embedding FORMAT`, ..."""
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        calls[name] = lambda: call(*args, **kwargs)

    for format in KERNEL_FORMATS:
        add(f"dequantize {format}", _dequantize, format)
    for format in FORMATS:  # formats of one layout differ in what is searched
        add(f"quantize {format}", _quantize, format, None)
    for format in ("q4_0", "q5_1", "int4_asym_g32", "q4_k", "q6_k"):
        add(f"quantize {format} importance", _quantize, format, _meta(4096, dtype=torch.float32))
    for format in KERNEL_FORMATS:
        add(f"quant_embedding {format}", _embedding, format)
        add(f"quant_matmul_input_grad {format}", _input_grad, format)
        for mode, m in product(modes(format), TOKENS):
            if m in (32, 64) and format not in COVERING:
                continue
            add(f"quant_matmul {format} {mode} m={m}", _product, m, format, mode)
            if m != 32 and (mode != "fp32" or format in COVERING):
                gated = {"gated": "silu"}
                add(f"quant_matmul {format} {mode} m={m} gated", _product, m, format, mode, **gated)
    for format in COVERING:
        add(f"quant_matmul_input_grad {format} f32", _input_grad, format, torch.float32)
    for m, mode in product((1, 2048), ("int8", "bf16")):
        residual = torch.empty((m, 4096), device="meta")
        name = f"quant_matmul q4_1 {mode} m={m} residual"
        add(name, _product, m, "q4_1", mode, residual=residual)
    fast = {"batch_invariant": False}
    add("quant_matmul q4_1 bf16 m=1 fast", _product, 1, "q4_1", "bf16", **fast)
    add("quant_matmul q4_1 bf16 m=1 gated fast", _product, 1, "q4_1", "bf16", gated="silu", **fast)
    add("quant_matmul int8 bf16 m=64 short", _product, 64, "int8", "bf16", k=576)
    add("quant_matmul fp8 fp8 m=64 short", _product, 64, "fp8", "fp8", k=576)
    add("sum_activation 128", lambda: quant_activation.sum_activation(_meta(8, 4096), 128))
    return calls


def packed(format: str, n: int, k: int, *experts: int) -> tuple[Tensor, Tensor]:
    """(data, scales) of a packed weight on the meta device."""
    found, scales = FORMATS[format], FORMATS[format].scales
    groups = -(-k // found.group) if found.group else 1
    if scales == "super_min" or scales == "super":
        shape, dtype = (k // 256, 20 if scales == "super_min" else 18), torch.uint8
    elif scales == "double":
        shape, dtype = (4 + -(-groups // 4) * 4,), torch.uint8
    else:
        shape = (groups, 1 if scales in ("half", "float") else 2, 1)
        dtype = torch.float32 if scales == "float" else torch.float16
    data = _meta(*experts, n, k // 32, found.bits, 1, 4, dtype=torch.uint8)
    return data, _meta(*experts, n, *shape, dtype=dtype)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dequantize(format: str) -> Tensor:
    data, scales = packed(format, 4096, 4096)
    return dequantize.dequantize(data, scales, format, 4096, torch.bfloat16)


def _quantize(format: str, importance: Tensor | None) -> None:
    quantize.quantize(_meta(4096, 4096), format, importance, *packed(format, 4096, 4096))


def _embedding(format: str) -> Tensor:
    ids = _meta(8, dtype=torch.int32)
    data, scales = packed(format, 49152, 4096)
    return embedding.quant_embedding(ids, data, scales, format, 49152, torch.float32)


def _input_grad(format: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    data, scales = packed(format, 4096, 14336)
    dy = _meta(2048, 4096, dtype=dtype)
    return quant_matmul_input_grad.quant_matmul_input_grad(dy, data, scales, format)


def _product(m: int, format: str, mode: str, k: int = 4096, **options: Any) -> Tensor:
    x = _meta(m, k, dtype=torch.float32 if mode == "fp32" else torch.bfloat16)
    n = 28672 if options.get("gated") else 4096
    data, scales = packed(format, n, k)
    return quant_matmul.quant_matmul(x, data, scales, format, n, None, mode, **options)
