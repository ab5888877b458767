"""Gradients of RMSNorm, alone or behind the residual add.

With n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g * n)) and dweight = sum(dy * n).
Weight gradients are summed over chunks of rows that the width alone decides, each in the order of
its rows, and then over the chunks in order: their bits do not depend on threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op


def rms_norm_backward_ref(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dweight_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `rms_norm_backward`: fp32 inside, one rounding."""
    dx, dweight = _gradients(dy, x, weight, eps, dweight_dtype)
    return dx.to(x.dtype).contiguous(), dweight


def add_rms_norm_backward_ref(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of `add_rms_norm_backward`."""
    dresidual, dweight = _gradients(dy, h, weight, eps, dweight_dtype)
    if dh is not None:
        dresidual = dresidual + dh
    dx = h.new_empty(0) if dx_dtype is None else dresidual.to(dx_dtype, copy=True).contiguous()
    return dx, dresidual.contiguous(), dweight


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dweight_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    x32, dy32 = x.float(), dy.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    n = x32 * rstd
    g = dy32 * weight.float()
    dx = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    if dweight_dtype is None:
        return dx, dx.new_empty(0)
    dweight = (dy32 * n).reshape(-1, x.shape[-1]).sum(0).to(dweight_dtype)
    return dx, dweight


def _dweight_like(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return weight.new_empty(0, dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=dtype)


def _fake(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dweight_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _dweight_like(weight, dweight_dtype)


def _add_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = h.new_empty(0) if dx_dtype is None else h.new_empty(h.shape, dtype=dx_dtype)
    return dx, h.new_empty(h.shape), _dweight_like(weight, dweight_dtype)


# A dtype of None: that gradient is not wanted, and is a tensor of no elements.
rms_norm_backward = Op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, ScalarType? dweight_dtype)"
    " -> (Tensor, Tensor)",
    rms_norm_backward_ref,
    fake=_fake,
)
add_rms_norm_backward = Op(
    "add_rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, float eps,"
    " ScalarType? dx_dtype, ScalarType? dweight_dtype) -> (Tensor, Tensor, Tensor)",
    add_rms_norm_backward_ref,
    fake=_add_fake,
)


def _native_shape(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> bool:
    return x.ndim <= 3 and x.stride(-1) == 1 and dy.is_contiguous() and weight.is_contiguous()


@rms_norm_backward.impl("native", "cpu", when=_native_shape)
def _rms_norm_backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dweight_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    dweight, partial = _dweight_outputs(x, weight, dweight_dtype)
    _C.rms_norm_backward(dx, None, dweight, partial, dy, None, x, weight, eps)
    return dx, _dweight_like(weight, None) if dweight is None else dweight


def _native_add(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, *_: Any) -> bool:
    rows = (dy, h, weight) if dh is None else (dy, h, weight, dh)
    return h.ndim <= 3 and all(t.is_contiguous() for t in rows)


@add_rms_norm_backward.impl("native", "cpu", when=_native_add)
def _add_rms_norm_backward_cpu(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = None if dx_dtype is None else h.new_empty(h.shape, dtype=dx_dtype)
    dresidual = h.new_empty(h.shape, dtype=torch.float32)
    dweight, partial = _dweight_outputs(h, weight, dweight_dtype)
    _C.rms_norm_backward(dx, dresidual, dweight, partial, dy, dh, h, weight, eps)
    return (
        h.new_empty(0) if dx is None else dx,
        dresidual,
        _dweight_like(weight, None) if dweight is None else dweight,
    )


def _dweight_outputs(
    x: Tensor, weight: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    # The weight's gradient and the memory for the sums of its chunks.
    if dtype is None:
        return None, None
    n = weight.shape[0]
    rows = x.numel() // n if n else 0
    partial = x.new_empty(_C.rms_norm_backward_scratch(rows, n), dtype=torch.float32)
    return x.new_empty(n, dtype=dtype), partial


@rms_norm_backward.impl("triton", "cuda")
def _rms_norm_backward_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import rms_norm_backward as kernel

    return kernel.rms_norm_backward(*args)


@add_rms_norm_backward.impl("triton", "cuda")
def _add_rms_norm_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import rms_norm_backward as kernel

    return kernel.add_rms_norm_backward(*args)
