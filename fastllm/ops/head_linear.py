"""A linear map of its own for every head, as multi-head latent attention needs two of.

y[t, h] = weight[h] @ x[t, h], with `tail[t, h]` behind it: the query whose key map is absorbed is
such a product followed by the rotated part. Sums are those of `linear`: fp32 over ascending K, the
same for any number of rows, whichever way a head's weight lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op

_DTYPES = (torch.float32, torch.bfloat16)


def head_linear_ref(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    """Plain PyTorch definition of `head_linear`: products and sums in fp32, one rounding."""
    y = (x.float().transpose(0, 1) @ weight.float().mT).transpose(0, 1).to(x.dtype)
    return y.contiguous() if tail is None else torch.cat((y, tail), dim=-1)


def _head_linear_fake(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    width = weight.shape[1] + (0 if tail is None else tail.shape[2])
    return x.new_empty(x.shape[0], x.shape[1], width)


def _save_head_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, tail = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_tail = tail is not None


def _head_linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    g = dy[..., : weight.shape[1]].transpose(0, 1)  # [H, T, N]
    dx = (g @ weight).transpose(0, 1) if ctx.needs_input_grad[0] else None
    dweight = g.mT @ x.transpose(0, 1) if ctx.needs_input_grad[1] else None
    dtail = dy[..., weight.shape[1] :].contiguous() if ctx.has_tail else None
    return None if dx is None else dx.contiguous(), dweight, dtail


_head_linear = Op(
    "head_linear(Tensor x, Tensor weight, Tensor? tail=None) -> Tensor",
    head_linear_ref,
    fake=_head_linear_fake,
    backward=_head_linear_backward,
    setup_context=_save_head_linear,
)


def _layout(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> bool:
    lies = weight.stride(-1) == 1 or weight.stride(-2) == 1
    return x.stride(-1) == 1 and lies and (tail is None or tail.stride(-1) == 1)


@_head_linear.impl("native", "cpu", when=_layout)
def _head_linear_cpu(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    y = _head_linear_fake(x, weight, tail)
    _C.head_linear(y, x, weight, tail)
    return y


@_head_linear.impl("triton", "cuda", when=_layout)
def _head_linear_triton(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    from ..kernels import head_linear as kernel

    return kernel.head_linear(x, weight, tail)


def head_linear(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    """`weight[h] @ x[t, h]`, then `tail[t, h]`, for every token and head; differentiable.

    Args:
        x: `[T, H, K]`, float32 or bfloat16; any strides of T and H.
        weight: `[H, N, K]`, the dtype of `x`; rows or columns of a head contiguous, so that both
            `w.view(H, N, K)` and its transpose come without a copy.
        tail: `[T, H, P]`, the dtype of `x`; None: nothing follows.

    Returns:
        Contiguous `[T, H, N + P]` in the dtype of `x`.

    Raises:
        ValueError: on mismatched shapes or dtypes, naming the argument.
    """
    if x.ndim != 3 or x.dtype not in _DTYPES:
        raise ValueError(
            f"x must be float32 or bfloat16 of shape [T, H, K], got {x.dtype} of {tuple(x.shape)}"
        )
    if weight.ndim != 3 or weight.shape[0] != x.shape[1] or weight.shape[2] != x.shape[2]:
        raise ValueError(
            f"weight must have shape [{x.shape[1]}, N, {x.shape[2]}] (heads and columns of x), "
            f"got {tuple(weight.shape)}"
        )
    if tail is not None and (tail.ndim != 3 or tail.shape[:2] != x.shape[:2]):
        raise ValueError(
            f"tail must have shape [{x.shape[0]}, {x.shape[1]}, P] (tokens and heads of x), "
            f"got {tuple(tail.shape)}"
        )
    for name, other in (("weight", weight), ("tail", tail)):
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{name} is {other.dtype} and x is {x.dtype}: they must be the same")
    return _head_linear(x, weight, tail)
