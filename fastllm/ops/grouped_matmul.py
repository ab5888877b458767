"""One product for each expert, of rows that are sorted by expert: y[r] = x[r] @ weight[e].T.

Rows offsets[e] to offsets[e + 1] of x belong to expert e. Sums are fp32, rounded once; on the CPU
in the order of `linear`, so a row's bits depend on that row and its expert's weight alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .checks import values_readable
from .linear import contiguous_rows
from .registry import Op, gradient_dtype

_FLOATS = (torch.float32, torch.bfloat16)


def expert_ranges(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for experts that have any, by offsets clamped to `rows`."""
    bounds = [min(max(int(end), 0), rows) for end in offsets.tolist()]
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            yield expert, slice(begin, end)


def grouped_matmul_ref(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch definition of `grouped_matmul`: products and sums in fp32, one rounding."""
    n = weight.shape[2 if transposed else 1]
    y = torch.zeros((x.shape[0], n), dtype=torch.float32, device=x.device)
    for e, rows in expert_ranges(offsets, x.shape[0]):
        w = weight[e].float()
        y[rows] = x[rows].float() @ (w if transposed else w.T)
        if bias is not None:
            y[rows] += bias[e].float()
    return y.to(out_dtype or x.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    n = weight.shape[2 if transposed else 1]
    return x.new_empty((x.shape[0], n), dtype=out_dtype or x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, offsets, bias, ctx.transposed, _ = inputs
    ctx.save_for_backward(x, weight, offsets)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.weight_gradient = gradient_dtype(weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, offsets = ctx.saved_tensors
    g = dy.to(weight.dtype)
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _grouped_matmul(g, weight, offsets, None, not ctx.transposed, None)
    if ctx.needs_input_grad[1]:
        left, right = (x, g) if ctx.transposed else (g, x)
        dweight = grouped_weight_grad(left, right, offsets, ctx.weight_gradient)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        ones = g.new_ones((g.shape[0], 1))
        sums = grouped_weight_grad(g, ones, offsets, torch.float32)
        dbias = sums.squeeze(-1).to(ctx.bias_dtype)
    return dx, dweight, None, dbias, None, None


_grouped_matmul = Op(
    "grouped_matmul(Tensor x, Tensor weight, Tensor offsets, Tensor? bias=None, "
    "bool transposed=False, ScalarType? out_dtype=None) -> Tensor",
    grouped_matmul_ref,
    fake=_fake,
    backward=_backward,
    setup_context=_save,
)


def _dense_weight(x: Tensor, weight: Tensor, *_: Any) -> bool:
    return weight.stride(-1) == 1


@_grouped_matmul.impl("native", "cpu", when=_dense_weight)
def _grouped_matmul_cpu(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    n = weight.shape[2 if transposed else 1]
    y = x.new_empty((x.shape[0], n), dtype=out_dtype)
    _C.grouped_matmul(y, contiguous_rows(x), weight, offsets, bias, transposed)
    return y


@_grouped_matmul.impl("triton", "cuda")
def _grouped_matmul_cuda(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    from ..kernels import grouped_matmul as kernel

    return kernel.grouped_matmul(x, weight, offsets, bias, transposed, out_dtype)


def grouped_weight_grad_ref(
    dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Plain PyTorch definition of `grouped_weight_grad`."""
    shape = (offsets.shape[0] - 1, dy.shape[1], x.shape[1])
    out = torch.zeros(shape, dtype=torch.float32, device=x.device)
    for e, rows in expert_ranges(offsets, x.shape[0]):
        out[e] = dy[rows].float().T @ x[rows].float()
    return out.to(out_dtype or x.dtype)


def _weight_grad_fake(
    dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    shape = (offsets.shape[0] - 1, dy.shape[1], x.shape[1])
    return x.new_empty(shape, dtype=out_dtype or x.dtype)


_grouped_weight_grad = Op(
    "grouped_weight_grad(Tensor dy, Tensor x, Tensor offsets, ScalarType? out_dtype=None) "
    "-> Tensor",
    grouped_weight_grad_ref,
    fake=_weight_grad_fake,
)


@_grouped_weight_grad.impl("native", "cpu")
def _grouped_weight_grad_cpu(
    dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    shape = (offsets.shape[0] - 1, dy.shape[1], x.shape[1])
    out = x.new_empty(shape, dtype=out_dtype)
    _C.grouped_weight_grad(out, contiguous_rows(dy), contiguous_rows(x), offsets)
    return out


@_grouped_weight_grad.impl("triton", "cuda")
def _grouped_weight_grad_cuda(
    dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    from ..kernels import grouped_weight_grad as kernel

    return kernel.grouped_weight_grad(dy, x, offsets, out_dtype)


def grouped_weight_grad(
    dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`dy[rows].T @ x[rows]` of each expert's rows: the gradient of its weight.

    Args:
        dy: `[M, N]`, float32 or bfloat16, rows sorted by expert.
        x: `[M, K]`, the dtype of `dy`.
        offsets: int32 `[E + 1]`, non-decreasing, within [0, M].
        out_dtype: float32 or bfloat16; default that of `x`.

    Returns:
        Contiguous `[E, N, K]`: fp32 sums over ascending rows, rounded once; zeros where an expert
        has no rows.

    Raises:
        ValueError: on mismatched shapes or dtypes, or offsets out of order, naming the argument.
    """
    _check_rows(x, "x")
    if dy.dtype != x.dtype or dy.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"dy must be {x.dtype} of shape [{x.shape[0]}, N] like x, "
            f"got {dy.dtype} of {tuple(dy.shape)}"
        )
    check_offsets(offsets, x.shape[0])
    _check_out_dtype(out_dtype)
    return _grouped_weight_grad(dy, x, offsets, out_dtype)


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x[rows of e] @ weight[e].T + bias[e]` for every expert e; differentiable.

    Args:
        x: `[M, K]`, float32 or bfloat16, rows sorted by expert.
        weight: `[E, N, K]`, the dtype of `x`.
        offsets: int32 `[E + 1]`, non-decreasing, within [0, M]: expert e owns the rows
            offsets[e] to offsets[e + 1].
        bias: `[E, N]`, float32 or bfloat16, added in fp32.
        out_dtype: float32 or bfloat16; default that of `x`.

    Returns:
        Contiguous `[M, N]`; rows past offsets[E] are zero.

    Raises:
        ValueError: on mismatched shapes or dtypes, or offsets out of order, naming the argument.
    """
    _check_rows(x, "x")
    if weight.dtype != x.dtype or weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"weight must be {x.dtype} of shape [E, N, {x.shape[1]}] (the columns of x), "
            f"got {weight.dtype} of {tuple(weight.shape)}"
        )
    check_offsets(offsets, x.shape[0], weight.shape[0])
    if bias is not None and (bias.shape != weight.shape[:2] or bias.dtype not in _FLOATS):
        raise ValueError(
            f"bias must be float32 or bfloat16 of shape {tuple(weight.shape[:2])}, "
            f"got {bias.dtype} of {tuple(bias.shape)}"
        )
    _check_out_dtype(out_dtype)
    bias = None if bias is None else bias.contiguous()
    return _grouped_matmul(x, weight, offsets, bias, False, out_dtype)


def check_offsets(offsets: Tensor, rows: int, experts: int | None = None) -> None:
    """Raise ValueError unless `offsets` cut `rows` rows into runs, one for each expert.

    The order is checked where values can be read without side effects; kernels clamp.
    """
    wanted = "E + 1" if experts is None else str(experts + 1)
    if offsets.dtype != torch.int32 or offsets.dim() != 1 or not offsets.is_contiguous():
        raise ValueError(
            f"offsets must be contiguous int32 of shape [{wanted}], "
            f"got {offsets.dtype} of {tuple(offsets.shape)}"
        )
    if offsets.shape[0] < 1 or (experts is not None and offsets.shape[0] != experts + 1):
        raise ValueError(f"offsets must have shape [{wanted}], got {tuple(offsets.shape)}")
    if values_readable(offsets):
        ends = offsets.tolist()
        if ends != sorted(ends) or ends[0] < 0 or ends[-1] > rows:
            raise ValueError(f"offsets must be non-decreasing and within [0, {rows}], got {ends}")


def _check_rows(x: Tensor, name: str) -> None:
    if x.dtype not in _FLOATS or x.dim() != 2:
        raise ValueError(
            f"{name} must be float32 or bfloat16 with two dimensions, "
            f"got {x.dtype} of {tuple(x.shape)}"
        )


def _check_out_dtype(out_dtype: torch.dtype | None) -> None:
    if out_dtype not in (None, *_FLOATS):
        raise ValueError(f"out_dtype must be torch.float32 or torch.bfloat16, got {out_dtype}")
