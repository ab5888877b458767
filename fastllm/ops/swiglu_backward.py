"""Gradients of SwiGLU: of gate and of up, side by side in one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op


def swiglu_backward_ref(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Plain PyTorch definition of `swiglu_backward`: fp32 inside, one rounding."""
    # d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g)))
    gate32, dy32 = gate.float(), dy.float()
    sigmoid = torch.sigmoid(gate32)
    dgate = dy32 * up.float() * (sigmoid * (1 + gate32 * (1 - sigmoid)))
    dup = dy32 * (gate32 * sigmoid)
    return torch.cat((dgate, dup), dim=-1).to(gate.dtype)


def _fake(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))


# [..., 2 I]: the gradient of gate in the first half, that of up in the second, as the input of one
# product with both weights wants them.
swiglu_backward = Op(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> Tensor", swiglu_backward_ref, fake=_fake
)


def _native(dy: Tensor, gate: Tensor, up: Tensor) -> bool:
    rows = gate.stride(-1) == 1 and up.stride(-1) == 1 and dy.is_contiguous()
    return rows and gate.ndim <= 3 and dy.dtype == gate.dtype


@swiglu_backward.impl("native", "cpu", when=_native)
def _swiglu_backward_cpu(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    both = torch.empty((*gate.shape[:-1], 2 * gate.shape[-1]), dtype=gate.dtype)
    _C.swiglu_backward(both, dy, gate, up)
    return both


@swiglu_backward.impl("triton", "cuda")
def _swiglu_backward_triton(*args: Any) -> Tensor:
    from ..kernels import swiglu_backward as kernel

    return kernel.swiglu_backward(*args)
