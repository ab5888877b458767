"""SwiGLU (Shazeer, 2020): silu(gate) * up, between the two matmuls of a gated feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _C
from .registry import Op
from .swiglu_backward import swiglu_backward


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """Plain PyTorch definition of `swiglu`: fp32 inside, one rounding to the dtype of `gate`."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype).contiguous()


def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_grads(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return swiglu_backward(dy.contiguous(), gate, up).split(gate.shape[-1], dim=-1)


_swiglu = Op(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    swiglu_ref,
    fake=_swiglu_fake,
    backward=_swiglu_grads,
    setup_context=_save_swiglu,
)


def _native_swiglu(gate: Tensor, up: Tensor) -> bool:
    return gate.ndim <= 3 and gate.stride(-1) == 1 and up.stride(-1) == 1


@_swiglu.impl("native", "cpu", when=_native_swiglu)
def _swiglu_cpu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype)
    _C.swiglu(y, gate, up)
    return y


@_swiglu.impl("triton", "cuda")
def _swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    from ..kernels import swiglu as kernel

    return kernel.swiglu(gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise; differentiable.

    Args:
        gate: `[..., I]`, float32 or bfloat16; it and `up` may be views of one `[..., 2 I]`.
        up: shaped and typed like `gate`.

    Returns:
        Contiguous tensor shaped and typed like `gate`.

    Raises:
        ValueError: if `up` differs from `gate` in shape or dtype, or they are scalars.
    """
    if gate.ndim < 1:
        raise ValueError("gate must have at least one dimension")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"up must be {gate.dtype} of shape {tuple(gate.shape)} like gate, "
            f"got {up.dtype} of {tuple(up.shape)}"
        )
    return _swiglu(gate, up)
