"""Dense linear layer: y = x @ weight.T + bias, fp32 accumulation, one rounding.

On the CPU every output is summed in fp32 over ascending K, in chunks of 256 (bf16) or 32 columns,
whatever the number of rows or threads and whether the weight is packed ahead or on the fly: a row's
bits never change.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .checks import values_readable
from .registry import Op, gradient_dtype


def linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Plain PyTorch definition of `linear`: products and sums in fp32, one rounding."""
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype or x.dtype)


def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or x.dtype)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.weight_gradient = gradient_dtype(weight)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    g = dy.to(weight.dtype)
    dx = g @ weight if ctx.needs_input_grad[0] else None
    dweight = dbias = None
    if ctx.needs_input_grad[1]:
        dweight = _weight_gradient(as_rows(g), as_rows(x), ctx.weight_gradient)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        dbias = as_rows(dy.float()).sum(0).to(ctx.bias_dtype)
    return dx, dweight, dbias, None


def _weight_gradient(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """g' x `[N, K]` of g `[M, N]` and x `[M, K]`.

    torch's product where its dtype is the one wanted. Sums in fp32 of bf16 matrices, which torch
    cannot give on a CPU, are made natively: a tenth to two fifths sooner than rounded sums widened
    again, at the sizes of a 135M model.
    """
    plain = g.dtype == torch.bfloat16 and g.stride(1) == 1 and x.stride(1) == 1 and g.shape[0] > 0
    if dtype != torch.float32 or not plain or not values_readable(g):
        return g.T @ x
    y = g.new_empty((g.shape[1], x.shape[1]), dtype=torch.float32)
    gradient_product(y, g, x, transposed=True)
    return y


FEW_ROWS = 12  # of x: as many as a tile holds
_LINE = 64  # bytes
# Where a word of the weight and of x is one step of the kernel.
_LEVELS = {torch.bfloat16: ("avx512_bf16",), torch.float32: ("avx512", "avx512_bf16")}


def reads_in_place(weight: Tensor) -> bool:
    """Whether up to FEW_ROWS rows are multiplied by `weight` on the CPU where it lies, unpacked."""
    whole = weight.ndim == 2 and weight.shape[1] * weight.itemsize % _LINE == 0
    return whole and weight.is_cpu and _C.isa() in _LEVELS.get(weight.dtype, ())


def gradient_product(
    y: Tensor, a: Tensor, b: Tensor, *, transposed: bool = False, add: bool = False
) -> None:
    """y (+)= a @ b, or a.T @ b, natively on the CPU with fp32 sums; rows are contiguous."""
    k = a.shape[0 if transposed else 1]
    scratch = b.new_empty(_C.gradient_product_scratch(b.shape[1], k, transposed), dtype=torch.uint8)
    _C.gradient_product(y, a, b, scratch, transposed, add)


_linear = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor",
    linear_ref,
    fake=_linear_fake,
    backward=_linear_backward,
    setup_context=_save_linear,
)


def as_rows(x: Tensor) -> Tensor:
    """x `[..., K]` as `[M, K]`: a view wherever the strides allow it."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy where its columns do not lie side by side: gradients come expanded too."""
    # An expanded tensor without elements is contiguous to torch, whatever its strides.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def prepared_rows(x2: Tensor) -> Tensor | None:
    """Memory in which all threads prepare the rows of x `[m, k]` together, or None.

    None means that each thread prepares its own copy: a few rows are prepared faster than threads
    can meet. The size is that of `prepared_bytes` in csrc.
    """
    m, k = x2.shape
    if m <= 16 and m * k <= 65536:
        return None
    return x2.new_empty((m + 12) * (4 * k + k // 32 * 8 + 64), dtype=torch.uint8)


def _native_layout(x: Tensor, weight: Tensor, *_: Any) -> bool:
    return x.stride(-1) == 1 and weight.stride(-1) == 1


@_linear.impl("native", "cpu", when=_native_layout)
def native_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`linear` of right arguments on the CPU, outside of autograd: what a layer calls per token."""
    x2 = as_rows(x)
    y = x2.new_empty((x2.shape[0], weight.shape[0]), dtype=out_dtype)
    _C.linear(y, x2, weight, bias, prepared_rows(x2))
    return y.view(*x.shape[:-1], weight.shape[0])


@_linear.impl("triton", "cuda")
def _linear_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    from ..kernels import linear as kernel
    from .registry import batch_invariant

    return kernel.linear(x, weight, bias, out_dtype, batch_invariant=batch_invariant())


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`x @ weight.T + bias` with fp32 accumulation; differentiable.

    Args:
        x: `[..., K]`, float32 or bfloat16.
        weight: `[N, K]`, the dtype of `x`.
        bias: `[N]`, float32 or bfloat16, added in fp32.
        out_dtype: float32 or bfloat16; default that of `x`.

    Returns:
        Contiguous `[..., N]`.

    Raises:
        ValueError: on mismatched shapes or dtypes, naming the argument.
    """
    _check(x, weight, bias, out_dtype)
    bias = bias if bias is None else bias.contiguous()
    return _linear(x, weight, bias, out_dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x must be float32 or bfloat16, got {x.dtype}")
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape [N, {x.shape[-1] if x.dim() else 'K'}] (the columns of x), "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} and x is {x.dtype}: they must be the same")
    check_output(bias, out_dtype, weight.shape[0])


def check_output(bias: Tensor | None, out_dtype: torch.dtype | None, n: int) -> None:
    """Raise ValueError unless bias and out_dtype fit an output of n columns."""
    if bias is not None and (
        tuple(bias.shape) != (n,) or bias.dtype not in (torch.float32, torch.bfloat16)
    ):
        raise ValueError(
            f"bias must be float32 or bfloat16 of shape [{n}], "
            f"got {bias.dtype} of {tuple(bias.shape)}"
        )
    if out_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"out_dtype must be torch.float32 or torch.bfloat16, got {out_dtype}")
