"""Cases of swiglu."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..opinfo import Args, Case, OpInfo

SHAPES = ((1, 1536), (3, 5, 100), (2, 3), (0, 64), (17,), (5, 257))
BENCH_SHAPES = ((1, 1536), (512, 1536), (2048, 8192))


def _case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        gate, up = torch.randn(2, *shape, generator=g).to(dtype)
        return gate, up

    return Case(label="x".join(map(str, shape)), make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield _case(shape, dtype)

    def halves_of_one_projection(g: torch.Generator) -> Args:
        both = torch.randn(4, 2 * 96, generator=g).to(dtype)
        return both[:, :96], both[:, 96:]

    def large_values(g: torch.Generator) -> Args:
        gate, up = torch.randn(2, 3, 64, generator=g).to(dtype)
        return gate * 100, up

    yield Case(label="halves", make=halves_of_one_projection)
    yield Case(label="large", make=large_values)


def _exact(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.double()) * up.double()


def _peer(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


INFOS = [
    OpInfo(
        name="swiglu",
        cases=_cases,
        exact=_exact,
        peer=_peer,
        grad_args=(0, 1),
        bench_cases=lambda dtype: (_case(shape, dtype) for shape in BENCH_SHAPES),
        bytes_moved=lambda gate, up: 3 * gate.nbytes,
    ),
]
