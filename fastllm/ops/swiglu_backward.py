"""Gradients of gated activations: of gate and of up, side by side in one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .gated_activation import ACTIVATIONS, gated_gradients
from .registry import Op


def swiglu_backward_ref(dy: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Plain PyTorch definition of `swiglu_backward`: fp32 inside, one rounding."""
    by_gate, by_up = gated_gradients(gate.float(), up.float(), activation)
    return torch.cat((dy.float() * by_gate, dy.float() * by_up), dim=-1).to(gate.dtype)


def _fake(dy: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    return gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))


def _variant(dy: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> str:
    return activation


# [..., 2 I]: the gradient of gate in the first half, that of up in the second, as the input of one
# product with both weights wants them.
swiglu_backward = Op(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, str activation='silu') -> Tensor",
    swiglu_backward_ref,
    fake=_fake,
    variant=_variant,
)


def _native(dy: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> bool:
    rows = gate.stride(-1) == 1 and up.stride(-1) == 1 and dy.is_contiguous()
    return rows and gate.ndim <= 3 and dy.dtype == gate.dtype


@swiglu_backward.impl("native", "cpu", variants=ACTIVATIONS, when=_native)
def _swiglu_backward_cpu(dy: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    both = gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))
    _C.swiglu_backward(both, dy, gate, up, ACTIVATIONS.index(activation))
    return both


@swiglu_backward.impl("triton", "cuda", variants=ACTIVATIONS)
def _swiglu_backward_triton(*args: Any) -> Tensor:
    from ..kernels import swiglu_backward as kernel

    return kernel.swiglu_backward(*args)
