"""SwiGLU and its kin (Shazeer, 2020): act(gate) * up, between the matmuls of a feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .gated_activation import ACTIVATIONS, check_activation, gated_activation
from .registry import Op
from .swiglu_backward import swiglu_backward


def swiglu_ref(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Plain PyTorch definition of `swiglu`: fp32 inside, one rounding to the dtype of `gate`."""
    return gated_activation(gate.float(), up.float(), activation).to(gate.dtype).contiguous()


def _swiglu_fake(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    return gate.new_empty(gate.shape)


def _variant(gate: Tensor, up: Tensor, activation: str = "silu") -> str:
    return activation


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _swiglu_grads(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    both = swiglu_backward(dy.contiguous(), gate, up, ctx.activation)
    return *both.split(gate.shape[-1], dim=-1), None


_swiglu = Op(
    "swiglu(Tensor gate, Tensor up, str activation='silu') -> Tensor",
    swiglu_ref,
    fake=_swiglu_fake,
    backward=_swiglu_grads,
    setup_context=_save_swiglu,
    variant=_variant,
)


def _native_swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> bool:
    return gate.ndim <= 3 and gate.stride(-1) == 1 and up.stride(-1) == 1


@_swiglu.impl("native", "cpu", variants=ACTIVATIONS, when=_native_swiglu)
def _swiglu_cpu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    # Half as long as torch.empty of a shape: 0.8 us.
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _C.swiglu(y, gate, up, ACTIVATIONS.index(activation))
    return y


@_swiglu.impl("triton", "cuda", variants=ACTIVATIONS)
def _swiglu_triton(*args: Any) -> Tensor:
    from ..kernels import swiglu as kernel

    return kernel.swiglu(*args)


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`act(gate) * up`, elementwise; differentiable.

    Args:
        gate: `[..., I]`, float32 or bfloat16; it and `up` may be views of one `[..., 2 I]`.
        up: shaped and typed like `gate`.
        activation: "silu", "gelu", "gelu_tanh" or "swiglu_oai", see `fastllm.ops.gated_activation`.

    Returns:
        Contiguous tensor shaped and typed like `gate`.

    Raises:
        ValueError: if `up` differs from `gate` in shape or dtype, they are scalars, or the
            activation is unknown.
    """
    if gate.ndim < 1:
        raise ValueError("gate must have at least one dimension")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"up must be {gate.dtype} of shape {tuple(gate.shape)} like gate, "
            f"got {up.dtype} of {tuple(up.shape)}"
        )
    check_activation(activation)
    return _swiglu(gate, up, activation)
