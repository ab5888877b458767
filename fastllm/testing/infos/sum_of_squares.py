"""Cases of sum_of_squares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..opinfo import Args, Case, OpInfo

SHAPES = ((3, 100), (1,), (0, 4), (5, 16384), (70_001,), ())


def _case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        return (torch.randn(shape, generator=g).to(dtype),)

    return Case(label="x".join(map(str, shape)) or "scalar", make=make)


def _exact(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _peer(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32).square()


INFOS = [
    OpInfo(
        name="sum_of_squares",
        cases=lambda dtype: (_case(shape, dtype) for shape in SHAPES),
        exact=_exact,
        peer=_peer,
        bench_cases=lambda dtype: iter([_case((4096, 4096), dtype)]),
        bytes_moved=lambda x: x.nbytes,
    ),
]
