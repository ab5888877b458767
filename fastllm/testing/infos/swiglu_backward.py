"""Cases of swiglu_backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..opinfo import Args, Case, OpInfo
from .swiglu import BENCH_SHAPES, SHAPES


def _case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        dy, gate, up = torch.randn(3, *shape, generator=g).to(dtype)
        return dy, gate, up

    return Case(label="x".join(map(str, shape)), make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield _case(shape, dtype)

    def halves_of_one_projection(g: torch.Generator) -> Args:
        both = torch.randn(4, 2 * 96, generator=g).to(dtype)
        return torch.randn(4, 96, generator=g).to(dtype), both[:, :96], both[:, 96:]

    def large_values(g: torch.Generator) -> Args:
        dy, gate, up = torch.randn(3, 3, 64, generator=g).to(dtype)
        return dy, gate * 100, up

    yield Case(label="halves", make=halves_of_one_projection)
    yield Case(label="large", make=large_values)


def _exact(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    dy, gate, up = dy.double(), gate.double(), up.double()
    s = torch.sigmoid(gate)
    return torch.cat((dy * up * s * (1 + gate * (1 - s)), dy * gate * s), -1)


def _torch_graph(dy: Tensor, gate: Tensor, up: Tensor) -> Args:
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    with torch.enable_grad():
        y = F.silu(leaves[0]) * leaves[1]
    return y, leaves, dy


def _torch_gradients(y: Tensor, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, dy, retain_graph=True)


INFOS = [
    OpInfo(
        name="swiglu_backward",
        cases=_cases,
        exact=_exact,
        bench_cases=lambda dtype: (_case(shape, dtype) for shape in BENCH_SHAPES),
        bench_peer=(_torch_graph, _torch_gradients),
        bytes_moved=lambda dy, *_: 5 * dy.nbytes,
    ),
]
