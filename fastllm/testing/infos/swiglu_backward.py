"""Cases of swiglu_backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..moe_problem import ACTIVATIONS, activate
from ..opinfo import Args, Case, OpInfo
from .swiglu import BENCH_SHAPES, SHAPES, away_from_limits


def _case(shape: tuple[int, ...], dtype: torch.dtype, activation: str = "silu") -> Case:
    def make(g: torch.Generator) -> Args:
        dy, gate, up = torch.randn(3, *shape, generator=g).to(dtype)
        return dy, gate, up, activation

    return Case(label=f"{'x'.join(map(str, shape))} {activation}", make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield _case(shape, dtype)
    for activation in ACTIVATIONS[1:]:
        yield _case((5, 257), dtype, activation)

    def halves_of_one_projection(g: torch.Generator) -> Args:
        both = torch.randn(4, 2 * 96, generator=g).to(dtype)
        return torch.randn(4, 96, generator=g).to(dtype), both[:, :96], both[:, 96:], "gelu_tanh"

    yield Case(label="halves", make=halves_of_one_projection)
    for activation in ACTIVATIONS:

        def large_values(g: torch.Generator, activation: str = activation) -> Args:
            gate, up = away_from_limits(torch.randn(2, 3, 64, generator=g) * 8).to(dtype)
            dy = torch.randn(3, 64, generator=g).to(dtype)
            return dy, gate * 12 if activation == "silu" else gate, up, activation

        yield Case(label=f"large {activation}", make=large_values)


def _exact(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y, leaves, dy = _torch_graph(dy.double(), gate.double(), up.double(), activation)
    return torch.cat(_torch_gradients(y, leaves, dy), -1)


def _torch_graph(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> Args:
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    with torch.enable_grad():
        if activation == "silu":
            y = F.silu(leaves[0]) * leaves[1]
        else:
            y = activate(leaves[0], leaves[1], activation)
    return y, leaves, dy


def _torch_gradients(y: Tensor, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, dy, retain_graph=True)


INFOS = [
    OpInfo(
        name="swiglu_backward",
        cases=_cases,
        exact=_exact,
        bench_cases=lambda dtype: (
            _case(shape, dtype, activation)
            for shape in BENCH_SHAPES
            for activation in ("silu", "gelu_tanh")
        ),
        bench_peer=(_torch_graph, _torch_gradients),
        bytes_moved=lambda dy, *_: 5 * dy.nbytes,
        variants=ACTIVATIONS,
    ),
]
