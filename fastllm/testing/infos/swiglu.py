"""Cases of swiglu."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..moe_problem import ACTIVATIONS, activate
from ..opinfo import Args, Case, OpInfo

SHAPES = ((1, 1536), (3, 5, 100), (2, 3), (0, 64), (17,), (5, 257))
BENCH_SHAPES = ((1, 1536), (512, 1536), (2048, 8192))


def away_from_limits(x: Tensor) -> Tensor:
    """`x` with what lies near 7 or -7 moved: one rounding there decides whether "swiglu_oai" passes
    a gradient.
    """
    return torch.where((x.abs() - 7).abs() < 0.1, x * 1.1, x)


def _case(shape: tuple[int, ...], dtype: torch.dtype, activation: str = "silu") -> Case:
    def make(g: torch.Generator) -> Args:
        gate, up = torch.randn(2, *shape, generator=g).to(dtype)
        return gate, up, activation

    return Case(label=f"{'x'.join(map(str, shape))} {activation}", make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield _case(shape, dtype)
    for activation in ACTIVATIONS[1:]:
        yield _case((5, 257), dtype, activation)

    def halves_of_one_projection(g: torch.Generator) -> Args:
        both = torch.randn(4, 2 * 96, generator=g).to(dtype)
        return both[:, :96], both[:, 96:], "gelu_tanh"

    yield Case(label="halves", make=halves_of_one_projection)
    for activation in ACTIVATIONS:

        def large_values(g: torch.Generator, activation: str = activation) -> Args:
            gate, up = away_from_limits(torch.randn(2, 3, 64, generator=g) * 8).to(dtype)
            return gate * 12 if activation == "silu" else gate, up, activation

        yield Case(label=f"large {activation}", make=large_values)


def _exact(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return activate(gate.double(), up.double(), activation)


def _peer(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate) * up
    return activate(gate, up, activation)


INFOS = [
    OpInfo(
        name="swiglu",
        cases=_cases,
        exact=_exact,
        peer=_peer,
        grad_args=(0, 1),
        bench_cases=lambda dtype: (
            _case(shape, dtype, activation)
            for shape in BENCH_SHAPES
            for activation in ("silu", "gelu_tanh")
        ),
        bytes_moved=lambda gate, *_: 3 * gate.nbytes,
        variants=ACTIVATIONS,
    ),
]
