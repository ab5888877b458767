"""Launches of the router that compile every one of its tiles, for `ahead_of_time`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import moe_gate, moe_gate_backward


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gate(tokens: int, experts: int, k: int, biased: bool, *options: Any) -> Any:
    bias = _meta(experts) if biased else None
    return moe_gate.moe_gate(_meta(tokens, experts), bias, k, *options)


def _backward(tokens: int, experts: int, k: int, *options: Any) -> Tensor:
    ids = _meta(tokens, k, dtype=torch.int32)
    gradients = _meta(tokens, k), _meta(experts), _meta()
    return moe_gate_backward.moe_gate_backward(_meta(tokens, experts), ids, *gradients, *options)


def gate_launches() -> dict[str, Callable[[], Any]]:
    """Routers of Mixtral, Qwen3-MoE, DeepSeek-V2 and V3, and the widest; few tokens and many."""
    plain = ("softmax", 1, 1, "max", True, 1.0)
    v2 = ("softmax", 8, 3, "max", False, 16.0)
    v3 = ("sigmoid", 8, 4, "top2", True, 2.5)
    softmax, sigmoid = ("softmax", True, 1.0), ("sigmoid", True, 2.5)
    return {
        "moe_gate mixtral": lambda: _gate(2048, 8, 2, False, *plain),
        "moe_gate qwen3": lambda: _gate(2048, 128, 8, False, *plain),
        "moe_gate one token": lambda: _gate(1, 128, 8, False, *plain),
        "moe_gate 512 experts": lambda: _gate(2048, 512, 16, False, *plain),
        "moe_gate deepseek_v2": lambda: _gate(2048, 160, 6, False, *v2),
        "moe_gate deepseek_v3": lambda: _gate(2048, 256, 8, True, *v3),
        "moe_gate_backward mixtral": lambda: _backward(2048, 8, 2, *softmax),
        "moe_gate_backward qwen3": lambda: _backward(2048, 128, 8, *softmax),
        "moe_gate_backward deepseek_v3": lambda: _backward(2048, 256, 8, *sigmoid),
        "moe_gate_backward 512 experts": lambda: _backward(2048, 512, 16, *softmax),
    }
