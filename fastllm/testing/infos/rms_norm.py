"""Cases of rms_norm and add_rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..opinfo import Args, Case, OpInfo

EPS = 1e-5
SHAPES = ((1, 576), (7, 3, 64), (5, 100), (3, 1), (0, 64), (2, 17), (33, 128))
BENCH_SHAPES = ((1, 576), (512, 576), (4096, 4096))


def _randn(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def _rms_norm_case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        return _randn(g, *shape, dtype=dtype), _randn(g, shape[-1], dtype=dtype), EPS, None

    # With one column x * rstd is the sign of x: the gradient vanishes up to eps.
    return Case(label="x".join(map(str, shape)), make=make, gradients=shape[-1] > 1)


def _rms_norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield _rms_norm_case(shape, dtype)

    def heads_of_a_fused_projection(g: torch.Generator) -> Args:
        qkv = _randn(g, 6, 10 * 64, dtype=dtype)
        return qkv[:, 64:256].unflatten(1, (3, 64)), _randn(g, 64), EPS, None

    def other_out_dtype(g: torch.Generator) -> Args:
        return _randn(g, 4, 96), _randn(g, 96, dtype=dtype), EPS, dtype

    def tiny_values(g: torch.Generator) -> Args:
        return _randn(g, 4, 64, dtype=dtype) * 1e-20, _randn(g, 64), EPS, None

    yield Case(label="strided-heads", make=heads_of_a_fused_projection)
    yield Case(label="out-dtype", make=other_out_dtype)
    yield Case(label="tiny", make=tiny_values)


def _rms_norm_exact(x: Tensor, weight: Tensor, eps: float, out_dtype: object = None) -> Tensor:
    return F.rms_norm(x.double(), weight.shape, weight.double(), eps)


def _rms_norm_peer(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(out_dtype or x.dtype)


def _add_case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        return _randn(g, *shape, dtype=dtype), _randn(g, *shape), _randn(g, shape[-1]), EPS

    return Case(label="x".join(map(str, shape)), make=make, gradients=shape[-1] > 1)


def _add_exact(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = residual.double() + x.double()
    return F.rms_norm(h, weight.shape, weight.double(), eps), h


INFOS = [
    OpInfo(
        name="rms_norm",
        cases=_rms_norm_cases,
        exact=_rms_norm_exact,
        peer=_rms_norm_peer,
        grad_args=(0, 1),
        bench_cases=lambda dtype: (_rms_norm_case(shape, dtype) for shape in BENCH_SHAPES),
        bytes_moved=lambda x, weight, *_: 2 * x.nbytes + weight.nbytes,
    ),
    OpInfo(
        name="add_rms_norm",
        cases=lambda dtype: (_add_case(shape, dtype) for shape in SHAPES),
        exact=_add_exact,
        grad_args=(0, 1, 2),
        bench_cases=lambda dtype: (_add_case(shape, dtype) for shape in BENCH_SHAPES),
        bytes_moved=lambda x, residual, *_: 2 * x.nbytes + 2 * residual.nbytes,
    ),
]
