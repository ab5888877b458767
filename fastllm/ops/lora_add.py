"""The last product of a low-rank adapter (LoRA, arXiv 2106.09685): y = base + scale * (t @ b.T).

`base` is the frozen layer's product in fp32 and t = x @ a.T; the sum is rounded once, so that an
adapter costs no second rounding of what the layer gave. The product is that of `linear`: training,
prompts and decode steps add the same numbers in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .linear import as_rows, check_output, prepared_rows
from .registry import Op


def lora_add_ref(
    t: Tensor, b: Tensor, base: Tensor, scale: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Plain PyTorch definition of `lora_add`: everything in fp32, one rounding."""
    return (base + scale * (t.float() @ b.float().T)).to(out_dtype or t.dtype)


def _lora_add_fake(
    t: Tensor, b: Tensor, base: Tensor, scale: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    return t.new_empty((*t.shape[:-1], b.shape[0]), dtype=out_dtype or t.dtype)


def _save_lora_add(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    t, b, _, ctx.scale, _ = inputs
    ctx.save_for_backward(t, b)


def _lora_add_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    t, b = ctx.saved_tensors
    needs_t, needs_b, needs_base = ctx.needs_input_grad[:3]
    g = dy.to(b.dtype)
    dt = (g @ b) * ctx.scale if needs_t else None
    db = (as_rows(g).T @ as_rows(t)) * ctx.scale if needs_b else None
    return dt, db, dy.float() if needs_base else None, None, None


_lora_add = Op(
    "lora_add(Tensor t, Tensor b, Tensor base, float scale, ScalarType? out_dtype=None) -> Tensor",
    lora_add_ref,
    fake=_lora_add_fake,
    backward=_lora_add_backward,
    setup_context=_save_lora_add,
)


def _native_layout(t: Tensor, b: Tensor, base: Tensor, *_: Any) -> bool:
    return t.stride(-1) == 1 and b.stride(-1) == 1 and base.stride(-1) == 1


@_lora_add.impl("native", "cpu", when=_native_layout)
def _lora_add_cpu(
    t: Tensor, b: Tensor, base: Tensor, scale: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    t2 = as_rows(t)
    # in its own shape: autograd forbids to change an output in place that is a view
    y = t.new_empty((*t.shape[:-1], b.shape[0]), dtype=out_dtype)
    y2 = y.view(t2.shape[0], b.shape[0])
    _C.lora_add(y2, t2, b, as_rows(base), scale, prepared_rows(t2))
    return y


@_lora_add.impl("triton", "cuda")
def _lora_add_cuda(
    t: Tensor, b: Tensor, base: Tensor, scale: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    from ..kernels import lora_add as kernel

    return kernel.lora_add(t, b, base, scale, out_dtype)


def lora_add(
    t: Tensor, b: Tensor, base: Tensor, scale: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`base + scale * (t @ b.T)`, summed in fp32 and rounded once; differentiable.

    Args:
        t: `[..., R]`, float32 or bfloat16; R, the rank, may be 0: `base` is rounded.
        b: `[N, R]`, the dtype of `t`.
        base: `[..., N]` float32, rows of any stride.
        scale: what the low-rank product is multiplied with.
        out_dtype: float32 or bfloat16; default that of `t`.

    Returns:
        Contiguous `[..., N]`.

    Raises:
        ValueError: on mismatched shapes or dtypes, naming the argument.
    """
    if t.dtype not in (torch.float32, torch.bfloat16) or t.dim() < 1:
        raise ValueError(
            "t must be float32 or bfloat16 with at least one dimension, "
            f"got {t.dtype} of {tuple(t.shape)}"
        )
    if b.dim() != 2 or b.dtype != t.dtype or b.shape[1] != t.shape[-1]:
        raise ValueError(
            f"b must be {t.dtype} of shape [N, {t.shape[-1]}], got {b.dtype} of {tuple(b.shape)}"
        )
    if base.dtype != torch.float32 or base.shape != (*t.shape[:-1], b.shape[0]):
        raise ValueError(
            f"base must be float32 of shape {(*t.shape[:-1], b.shape[0])}, "
            f"got {base.dtype} of {tuple(base.shape)}"
        )
    check_output(None, out_dtype, b.shape[0])
    return _lora_add(t, b, base, scale, out_dtype)
