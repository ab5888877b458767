"""Calls that launch the mixture-of-experts kernels with every tile that they ship, on meta tensors.

64 experts, 8 a token, of width 1,024 under a hidden size of 2,048. 8, 128, 512 and 4,096 tokens
give experts 1, 16, 64 and 512 rows: every tile of the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import (
    grouped_matmul,
    grouped_weight_grad,
    moe,
    moe_backward,
    moe_dispatch,
    quant_moe,
    quant_moe_backward,
)
from .moe_activation import ACTIVATIONS
from .quant_format import modes
from .quant_launches import COVERING, KERNEL_FORMATS, packed

EXPERTS, PER_TOKEN, HIDDEN, WIDTH = 64, 8, 2048, 1024
TOKENS = (8, 256, 512, 4096)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def moe_launches() -> dict[str, Callable[[], Any]]:
    """`moe DTYPE m=TOKENS [...]`, `moe_backward ...`, `quant_moe FORMAT MODE m=TOKENS`, ..."""
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        calls[name] = lambda: call(*args, **kwargs)

    for tokens in (8, 4096):
        add(f"moe_dispatch m={tokens}", _dispatch, tokens)
    for (name, dtype), tokens in product(DTYPES.items(), TOKENS):
        if dtype == torch.float32 and tokens == 256:
            continue
        for descriptor in (None, False) if name == "bf16" else (None,):
            path = "" if descriptor is None else " pointers"
            add(f"moe {name} m={tokens}{path}", _moe, tokens, dtype, descriptor=descriptor)
            if tokens > 8:
                call = f"moe_backward {name} m={tokens}{path}"
                add(call, _moe_backward, tokens, dtype, descriptor=descriptor)
    for activation in ACTIVATIONS[1:]:
        add(f"moe bf16 {activation} m=4096", _moe, 4096, activation=activation, everything=True)
        add(
            f"moe_backward bf16 {activation} m=4096",
            _moe_backward, 4096, activation=activation, everything=True,
        )  # fmt: skip
    for name, dtype in DTYPES.items():
        add(f"grouped_matmul {name}", _grouped, dtype)
        add(f"grouped_weight_grad {name}", _grouped_grads, dtype)
    for format, tokens in product(KERNEL_FORMATS, TOKENS):
        if tokens in (256, 512) and format not in COVERING:
            continue
        for mode in modes(format):
            if mode != "fp32" or format in COVERING:
                add(f"quant_moe {format} {mode} m={tokens}", _quant_moe, tokens, format, mode)
        if tokens > 256:
            add(f"quant_moe_backward {format} m={tokens}", _quant_backward, tokens, format)
    add("quant_moe_backward q4_1 f32", _quant_backward, 512, "q4_1", torch.float32)
    add("quant_moe_backward q4_1 gelu", _quant_backward, 4096, "q4_1", activation="gelu_tanh")
    return calls


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _places(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(topk_weights, offsets, slots)."""
    weights = _meta(tokens, PER_TOKEN, dtype=torch.float32)
    offsets = _meta(EXPERTS + 1, dtype=torch.int32)
    return weights, offsets, _meta(tokens * PER_TOKEN, dtype=torch.int32)


def _dispatch(tokens: int) -> tuple[Tensor, Tensor]:
    return moe_dispatch.moe_dispatch(_meta(tokens, PER_TOKEN, dtype=torch.int32), EXPERTS)


def _moe(
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu",
    everything: bool = False,
    descriptor: bool | None = None,
) -> Any:
    x = _meta(tokens, HIDDEN, dtype=dtype)
    gate_up = _meta(EXPERTS, 2 * WIDTH, HIDDEN, dtype=dtype)
    down = _meta(EXPERTS, HIDDEN, WIDTH, dtype=dtype)
    biases = gate_up[..., 0].contiguous(), down[..., 0].contiguous(), x.float()
    extra = biases if everything else (None, None, None)
    arguments = (x, gate_up, down, *_places(tokens), *extra, activation, True)
    return moe.moe(*arguments, descriptor=descriptor)


def _moe_backward(
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu",
    everything: bool = False,
    descriptor: bool | None = None,
) -> Any:
    x = _meta(tokens, HIDDEN, dtype=dtype)
    gate_up = _meta(EXPERTS, 2 * WIDTH, HIDDEN, dtype=dtype)
    down = _meta(EXPERTS, HIDDEN, WIDTH, dtype=dtype)
    pre = _meta(tokens * PER_TOKEN, 2 * WIDTH, dtype=dtype)
    biases = (
        (gate_up[..., 0].contiguous(), down[..., 0].contiguous()) if everything else (None,) * 2
    )
    wanted = [True] * 4 + [everything] * 2
    arguments = (x, x, gate_up, down, *_places(tokens), pre, *biases, activation, wanted)
    return moe_backward.moe_backward(*arguments, dtype, dtype, descriptor=descriptor)


def _grouped(dtype: torch.dtype) -> Any:
    weight = _meta(EXPERTS, WIDTH, HIDDEN, dtype=dtype)
    bias = _meta(EXPERTS, WIDTH, dtype=dtype)
    offsets = _meta(EXPERTS + 1, dtype=torch.int32)
    y = grouped_matmul.grouped_matmul(_meta(8192, HIDDEN, dtype=dtype), weight, offsets, bias)
    return y, grouped_matmul.grouped_matmul(y, weight, offsets, None, True)


def _grouped_grads(dtype: torch.dtype) -> Any:
    dy, x = _meta(8192, WIDTH, dtype=dtype), _meta(8192, HIDDEN, dtype=dtype)
    offsets = _meta(EXPERTS + 1, dtype=torch.int32)
    grads = grouped_weight_grad.grouped_weight_grad(dy, x, offsets)
    return grads, grouped_weight_grad.grouped_bias_grad(dy, offsets, torch.float32)


def _packed(format: str, n: int, k: int) -> tuple[Tensor, Tensor, str]:
    return *packed(format, n, k, EXPERTS), format


def _quant_moe(tokens: int, format: str, mode: str) -> Any:
    x = _meta(tokens, HIDDEN, dtype=torch.float32 if mode == "fp32" else torch.bfloat16)
    weights = *_packed(format, 2 * WIDTH, HIDDEN), *_packed(format, HIDDEN, WIDTH)
    extra = (None, None, None, "silu", mode, False)
    return quant_moe.quant_moe(x, *weights, WIDTH, *_places(tokens), *extra)


def _quant_backward(
    tokens: int, format: str, dtype: torch.dtype = torch.bfloat16, activation: str = "silu"
) -> Any:
    dy = _meta(tokens, HIDDEN, dtype=dtype)
    pre = _meta(tokens * PER_TOKEN, 2 * WIDTH, dtype=dtype)
    weights = *_packed(format, 2 * WIDTH, HIDDEN), *_packed(format, HIDDEN, WIDTH)
    extra = (pre, None, activation, [True, True])
    return quant_moe_backward.quant_moe_backward(dy, *weights, *_places(tokens), *extra)
