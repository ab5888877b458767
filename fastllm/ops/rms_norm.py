"""RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * weight.

Zhang and Sennrich, 2019 (arXiv 1910.07467). `rms_norm` normalizes; `add_rms_norm` first adds a
block's output to the fp32 residual stream, which a pre-norm decoder does between any two blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op, gradient_dtype
from .rms_norm_backward import add_rms_norm_backward, rms_norm_backward


def rms_norm_ref(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Plain PyTorch definition of `rms_norm`: fp32 inside, one rounding to the output dtype."""
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd * weight.float()).to(out_dtype or x.dtype).contiguous()


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `add_rms_norm`."""
    h = (residual + x.float()).contiguous()
    return rms_norm_ref(h, weight, eps, x.dtype), h


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.weight_gradient = gradient_dtype(weight)


def _rms_norm_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wanted = ctx.weight_gradient if ctx.needs_input_grad[1] else None
    dx, dweight = rms_norm_backward(dy.contiguous(), x, weight, ctx.eps, wanted)
    return dx, None if wanted is None else dweight, None, None


def _save_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.x_dtype, ctx.weight_gradient = x.dtype, gradient_dtype(weight)
    ctx.set_materialize_grads(False)


def _add_rms_norm_backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
    h, weight = ctx.saved_tensors
    dy = torch.zeros_like(h, dtype=ctx.x_dtype) if dy is None else dy.contiguous()
    dh = None if dh is None else dh.contiguous()
    wanted = ctx.weight_gradient if ctx.needs_input_grad[2] else None
    # In float32 the two gradients are one.
    narrow = None if ctx.x_dtype == torch.float32 else ctx.x_dtype
    dx, dresidual, dweight = add_rms_norm_backward(dy, dh, h, weight, ctx.eps, narrow, wanted)
    return (
        dresidual if narrow is None else dx,
        dresidual,
        None if wanted is None else dweight,
        None,
    )


_rms_norm = Op(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType? out_dtype=None) -> Tensor",
    rms_norm_ref,
    backward=_rms_norm_backward,
    setup_context=_save_rms_norm,
)
_add_rms_norm = Op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm_ref,
    backward=_add_rms_norm_backward,
    setup_context=_save_add_rms_norm,
)


def _native_shape(x: Tensor, weight: Tensor, *_: Any) -> bool:
    return x.ndim <= 3 and x.stride(-1) == 1 and weight.is_contiguous()


@_rms_norm.impl("native", "cpu", when=_native_shape)
def _rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    _C.rms_norm(y, x, weight, None, None, eps)
    return y


@_add_rms_norm.impl("native", "cpu")
def _add_rms_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    h = x.new_empty(x.shape, dtype=torch.float32)
    _C.rms_norm(y, x, weight, residual, h, eps)
    return y, h


@_rms_norm.impl("triton", "cuda")
def _rms_norm_triton(*args: Any) -> Tensor:
    from ..kernels import rms_norm as kernel

    return kernel.rms_norm(*args)


@_add_rms_norm.impl("triton", "cuda")
def _add_rms_norm_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import rms_norm as kernel

    return kernel.add_rms_norm(*args)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Root-mean-square normalization of the last dimension; differentiable.

    Args:
        x: `[..., N]`, float32 or bfloat16.
        weight: `[N]`, float32 or bfloat16.
        eps: added to the mean square.
        out_dtype: dtype of the result; default that of `x`.

    Returns:
        Contiguous tensor shaped like `x`.

    Raises:
        ValueError: if `weight` does not have one entry per column of `x`.
    """
    _check(x, weight)
    return _rms_norm(x, weight, eps, out_dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`h = residual + x` in fp32 and its RMSNorm, in one pass; differentiable.

    Args:
        x: `[..., N]`, a block's output, float32 or bfloat16.
        residual: float32, shaped like `x`.
        weight: `[N]`.
        eps: added to the mean square.

    Returns:
        `(y, h)`: the norm in the dtype of `x`, and the new residual stream in float32.

    Raises:
        ValueError: on mismatched shapes or a residual that is not float32.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != torch.float32:
        raise ValueError(
            f"residual must be float32 of shape {tuple(x.shape)} like x, "
            f"got {residual.dtype} of {tuple(residual.shape)}"
        )
    return _add_rms_norm(x, residual, weight, eps)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.ndim != 1 or x.ndim < 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight must have one entry per column of x, "
            f"got shapes {tuple(weight.shape)} and {tuple(x.shape)}"
        )
