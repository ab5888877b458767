"""Cases of rms_norm_backward and add_rms_norm_backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..opinfo import Args, Case, OpInfo
from .rms_norm import BENCH_SHAPES, EPS

SHAPES = ((1, 576), (70, 3, 64), (37, 100), (600, 33), (0, 64), (2, 17))
F32 = torch.float32


def _randn(g: torch.Generator, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def _case(shape: tuple[int, ...], dtype: torch.dtype, dweight: torch.dtype | None) -> Case:
    def make(g: torch.Generator) -> Args:
        dy, x = (_randn(g, *shape, dtype=dtype) for _ in range(2))
        return dy, x, _randn(g, shape[-1], dtype=dtype), EPS, dweight

    wanted = "frozen" if dweight is None else str(dweight).removeprefix("torch.")
    return Case(label="x".join(map(str, shape)) + "-" + wanted, make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        yield _case(shape, dtype, (dtype, F32, None)[i % 3])

    def heads_of_a_fused_projection(g: torch.Generator) -> Args:
        x = _randn(g, 6, 10 * 64, dtype=dtype)[:, 64:256].unflatten(1, (3, 64))
        return _randn(g, 6, 3, 64, dtype=dtype), x, _randn(g, 64), EPS, F32

    def other_out_dtype(g: torch.Generator) -> Args:
        return _randn(g, 20, 96, dtype=dtype), _randn(g, 20, 96), _randn(g, 96), EPS, dtype

    yield Case(label="strided-heads", make=heads_of_a_fused_projection)
    yield Case(label="out-dtype", make=other_out_dtype)


def _add_case(
    shape: tuple[int, ...], dtype: torch.dtype, both: bool, dweight: torch.dtype | None
) -> Case:
    def make(g: torch.Generator) -> Args:
        dy, dh = _randn(g, *shape, dtype=dtype), _randn(g, *shape) if both else None
        narrow = None if dtype == F32 else dtype
        return dy, dh, _randn(g, *shape), _randn(g, shape[-1], dtype=dtype), EPS, narrow, dweight

    label = "x".join(map(str, shape)) + ("" if both else "-alone")
    return Case(label=label + ("-frozen" if dweight is None else ""), make=make)


def _add_cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        yield _add_case(shape, dtype, i % 2 == 0, (F32, dtype, None)[i % 3])


def _exact(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dweight_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    with torch.enable_grad():
        y = F.rms_norm(x, weight.shape, weight, eps)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy.double())
    return dx, dweight if dweight_dtype is not None else dweight.new_empty(0)


def _add_exact(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = _exact(dy, h, weight, eps, dweight_dtype)
    if dh is not None:
        dx = dx + dh.double()
    return dx if dx_dtype is not None else dx.new_empty(0), dx, dweight


def _torch_graph(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dweight_dtype: torch.dtype | None
) -> Args:
    x, weight = x.detach().requires_grad_(), weight.detach().to(x.dtype)
    weight.requires_grad_(dweight_dtype is not None)
    with torch.enable_grad():
        y = F.rms_norm(x, weight.shape, weight, eps)
    return y, [t for t in (x, weight) if t.requires_grad], dy


def _torch_gradients(y: Tensor, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy, retain_graph=True)


INFOS = [
    OpInfo(
        name="rms_norm_backward",
        cases=_cases,
        exact=_exact,
        bench_cases=lambda dtype: (_case(shape, dtype, dtype) for shape in BENCH_SHAPES),
        bench_peer=(_torch_graph, _torch_gradients),
        bytes_moved=lambda dy, x, *_: dy.nbytes + 2 * x.nbytes,
    ),
    OpInfo(
        name="add_rms_norm_backward",
        cases=_add_cases,
        exact=_add_exact,
        bench_cases=lambda dtype: (_add_case(shape, dtype, True, F32) for shape in BENCH_SHAPES),
        bytes_moved=lambda dy, dh, h, *_: 3 * h.nbytes + (2 if dy.dtype != F32 else 1) * dy.nbytes,
    ),
]
