"""The gated activations of feed-forwards and experts: act(gate) * up, and what they pass back.

- "silu": silu(gate) * up (SwiGLU; Shazeer, 2020)
- "gelu", "gelu_tanh": GEGLU with the error function, or with its tanh approximation
- "swiglu_oai": the clamped SwiGLU of GPT-OSS, g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7)
  and u = clamp(up, -7, 7)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")  # in the order of csrc's enum Gating
LIMIT, SLOPE = 7.0, 1.702  # of swiglu_oai


def check_activation(activation: str) -> None:
    """Raise ValueError unless `activation` is a gated activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up in the dtype of its arguments, which is float32 or float64."""
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "swiglu_oai":
        g = gate.clamp(max=LIMIT)
        return g * torch.sigmoid(SLOPE * g) * (up.clamp(-LIMIT, LIMIT) + 1)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def gated_gradients(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The derivatives of `gated_activation` by gate and by up.

    Clamped arguments pass a gradient up to the limit, the limit itself included.
    """
    if activation == "swiglu_oai":
        g, u = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        s = torch.sigmoid(SLOPE * g)
        by_gate = (u + 1) * (s * (1 + SLOPE * g * (1 - s)))
        return by_gate * (gate <= LIMIT), g * s * (up.abs() <= LIMIT)
    slope, value = _slope_and_value(gate, activation)
    return up * slope, value


def _slope_and_value(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "silu":
        s = torch.sigmoid(gate)
        return s * (1 + gate * (1 - s)), gate * s
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
        return share + gate * density, gate * share
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (gate + 0.044715 * gate**3))
    share = 0.5 * (1 + t)
    slope = share + 0.5 * gate * (1 - t * t) * scale * (1 + 3 * 0.044715 * gate * gate)
    return slope, gate * share
