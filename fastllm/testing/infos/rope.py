"""Cases of rope."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.registry import FLOATS
from ..opinfo import Args, Case, OpInfo

# tokens, heads, head dim, rotated dims
SHAPES = ((1, 9, 64, 64), (5, 3, 80, 80), (3, 2, 128, 32), (2, 1, 24, 10), (0, 4, 64, 64))
BENCH_SHAPES = ((1, 9, 64, 64), (512, 32, 128, 128))
TABLE_ROWS = 300


def tables(g: torch.Generator, rotated: int) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles `[TABLE_ROWS, rotated / 2]`."""
    angles = torch.randn(TABLE_ROWS, rotated // 2, generator=g) * 3
    return angles.cos(), angles.sin()


def positions(g: torch.Generator, tokens: int) -> Tensor:
    """Random rows of the tables, the last one among them."""
    rows = torch.randint(TABLE_ROWS, (tokens,), generator=g, dtype=torch.int32)
    rows[-1:] = TABLE_ROWS - 1
    return rows


def _case(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    tokens, heads, dim, rotated = shape

    def make(g: torch.Generator) -> Args:
        x = torch.randn(tokens, heads, dim, generator=g).to(dtype)
        return x, positions(g, tokens), *tables(g, rotated)

    return Case(label="x".join(map(str, shape)), make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield _case(shape, dtype)

    def heads_of_a_fused_projection(g: torch.Generator) -> Args:
        qkv = torch.randn(7, 6 * 64, generator=g).to(dtype)
        return qkv[:, 128:256].unflatten(1, (2, 64)), positions(g, 7), *tables(g, 64)

    yield Case(label="strided-heads", make=heads_of_a_fused_projection)


def exact_rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in float64."""
    half = cos.shape[1]
    c, s = cos.double()[positions.long()][:, None], sin.double()[positions.long()][:, None]
    x1, x2, rest = x.double().split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s, rest), -1)


INFOS = [
    OpInfo(
        name="rope",
        cases=_cases,
        exact=exact_rope,
        dtypes=FLOATS,
        grad_args=(0,),
        bench_cases=lambda dtype: (_case(shape, dtype) for shape in BENCH_SHAPES),
        bytes_moved=lambda x, *_: 2 * x.nbytes,
    ),
]
