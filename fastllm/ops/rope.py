"""Rotary position embedding (Su et al., RoFormer, 2021) in the half-split layout of Hugging Face.

With halves x1 = x[:R/2], x2 = x[R/2:R]: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin; dimensions
from R on pass through. The tables carry every scaling (Llama 3, YaRN, linear), so one kernel
serves them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .checks import values_readable
from .registry import FLOATS, Op


def rope_ref(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Plain PyTorch definition of `rope`: products and sums in fp32, one rounding."""
    half = cos.shape[1]
    index = positions.long()
    c, s = cos[index][:, None], sin[index][:, None]  # [T, 1, R/2], over all heads
    x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def _rope_fake(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, positions, cos, sin = inputs
    ctx.save_for_backward(positions, cos, sin)


def _rope_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # A rotation's transpose is the rotation by the opposite angle.
    positions, cos, sin = ctx.saved_tensors
    return _rope(dy.contiguous(), positions, cos, -sin), None, None, None


_rope = Op(
    "rope(Tensor x, Tensor positions, Tensor cos, Tensor sin) -> Tensor",
    rope_ref,
    fake=_rope_fake,
    backward=_rope_backward,
    setup_context=_save_rope,
)


def _native_rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return x.stride(-1) == 1 and positions.is_contiguous() and tables_contiguous(cos, sin)


def tables_contiguous(cos: Tensor, sin: Tensor) -> bool:
    """Whether kernels can index the tables by row."""
    return cos.is_contiguous() and sin.is_contiguous()


@_rope.impl("native", "cpu", dtypes=FLOATS, when=_native_rope)
def _rope_cpu(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.rope(y, x, positions, cos, sin)
    return y


@_rope.impl("triton", "cuda", dtypes=FLOATS)
def _rope_triton(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from ..kernels import rope as kernel

    return kernel.rope(x, positions, cos, sin)


def rope(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, check_values: bool = True
) -> Tensor:
    """Rotate the first R dimensions of every head by its token's position; differentiable in `x`.

    Args:
        x: `[T, H, D]`, float32, bfloat16 or float16; any strides of T and H, last dimension
            contiguous.
        positions: `[T]` int32, below the tables' length.
        cos: `[Pmax, R/2]` float32, R <= D even.
        sin: `[Pmax, R/2]` float32.
        check_values: False where the caller itself made `positions` and they are inside the tables:
            reading them takes 3 us.

    Returns:
        `[T, H, D]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: on mismatched shapes or dtypes, or a position outside the tables.
    """
    check_rope(x, positions, cos, sin, "x", check_values)
    return _rope(x, positions, cos, sin)


def check_rope(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, name: str, check_values: bool = True
) -> None:
    """Raise ValueError unless `x` (called `name` in messages) can be rotated with these tables."""
    if x.ndim != 3:
        raise ValueError(f"{name} must have shape [T, H, D], got {tuple(x.shape)}")
    if positions.dtype != torch.int32 or positions.shape != x.shape[:1]:
        raise ValueError(
            f"positions must be int32 of shape [{x.shape[0]}] (one per token of {name}), "
            f"got {positions.dtype} of {tuple(positions.shape)}"
        )
    if cos.ndim != 2 or cos.dtype != torch.float32 or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(
            f"cos must be float32 of shape [Pmax, R/2] with R <= {x.shape[2]}, "
            f"got {cos.dtype} of {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape or sin.dtype != torch.float32:
        raise ValueError(
            f"sin must be float32 of shape {tuple(cos.shape)} like cos, "
            f"got {sin.dtype} of {tuple(sin.shape)}"
        )
    if check_values and values_readable(positions) and positions.numel():
        low, high = (int(v) for v in torch.aminmax(positions))
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"positions must lie in [0, {cos.shape[0]}) (the rows of cos), got {low} to {high}"
            )
