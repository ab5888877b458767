"""Cases of grouped_matmul and grouped_weight_grad."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..opinfo import Args, Case, OpInfo

# (rows of each expert, rows of none, n, k): empty experts, tiles of every size, odd columns, runs
# longer than a block of sums, nothing at all
Shape = tuple[tuple[int, ...], int, int, int]
SHAPES: tuple[Shape, ...] = (
    ((3, 0, 5, 1), 0, 33, 40),
    ((0, 12, 2, 4, 6, 7), 3, 17, 31),
    ((0, 0), 4, 20, 16),
    ((13,), 0, 48, 3),
    ((600, 0, 25), 0, 34, 18),
    ((1, 1, 1), 0, 1, 1),
    ((0, 3), 0, 5, 0),
    ((2, 3), 0, 0, 7),
    ((), 5, 6, 7),
)
BENCH_SHAPES: tuple[Shape, ...] = (
    ((256,) * 64, 0, 512, 512),
    ((512,) * 8, 0, 2048, 512),
    ((1,) * 64, 0, 512, 512),
)


def offsets_of(rows: tuple[int, ...]) -> Tensor:
    """int32 `[E + 1]` from the number of rows of each expert."""
    return torch.tensor((0, *rows)).cumsum(0).int()


def _label(rows: tuple[int, ...], rest: int, n: int, k: int) -> str:
    return f"{sum(rows)}+{rest}x{n}x{k}-{len(rows)}experts"


def _case(
    rows: tuple[int, ...], rest: int, n: int, k: int, dtype: torch.dtype, transposed: bool
) -> Case:
    def make(g: torch.Generator) -> Args:
        x = torch.randn(sum(rows) + rest, k, generator=g).to(dtype)
        shape = (len(rows), k, n) if transposed else (len(rows), n, k)
        weight = torch.randn(shape, generator=g).to(dtype)
        bias = None if transposed else torch.randn(len(rows), n, generator=g).to(dtype)
        return x, weight, offsets_of(rows), bias, transposed, None

    label = _label(rows, rest, n, k) + ("-transposed" if transposed else "")
    # Without a row of an expert the exact result depends on no argument.
    return Case(label=label, make=make, gradients=sum(rows) > 0)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        for transposed in (False, True):
            yield _case(*shape, dtype, transposed)

    def strided(g: torch.Generator) -> Args:
        x = torch.randn(20, 80, generator=g).to(dtype)[:, 5:70]
        weight = torch.randn(6, 24, 90, generator=g).to(dtype)[1::2, 2:22, 3:68]
        return x, weight, offsets_of((7, 0, 13)), torch.randn(3, 20, generator=g), False, None

    def other_output(g: torch.Generator) -> Args:
        x, weight = torch.randn(9, 40, generator=g), torch.randn(2, 18, 40, generator=g)
        other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
        return x.to(dtype), weight.to(dtype), offsets_of((4, 5)), None, False, other

    yield Case(label="strided", make=strided)
    yield Case(label="other-output", make=other_output)


def _exact(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool, *_: Any
) -> Tensor:
    ends = offsets.tolist()
    n = weight.shape[2 if transposed else 1]
    parts = [x.new_zeros(0, n, dtype=torch.float64)]
    for e in range(weight.shape[0]):
        w = weight[e].double()
        y = x[ends[e] : ends[e + 1]].double() @ (w if transposed else w.T)
        parts.append(y if bias is None else y + bias[e].double())
    rest = x.shape[0] - ends[-1]
    return torch.cat([*parts, x.new_zeros(rest, n, dtype=torch.float64)])


def _weight_grad_case(rows: tuple[int, ...], rest: int, n: int, k: int, dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        m = sum(rows) + rest
        dy, x = torch.randn(m, n, generator=g), torch.randn(m, k, generator=g)
        return dy.to(dtype), x.to(dtype), offsets_of(rows), None

    return Case(label=_label(rows, rest, n, k), make=make)


def _weight_grad_cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield _weight_grad_case(*shape, dtype)

    def many_rows(g: torch.Generator) -> Args:
        dy, x = torch.randn(1400, 13, generator=g), torch.randn(1400, 19, generator=g)
        other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
        return dy.to(dtype), x.to(dtype), offsets_of((0, 1101, 299)), other

    yield Case(label="many-rows-other-output", make=many_rows)


def _weight_grad_exact(dy: Tensor, x: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    ends = offsets.tolist()
    parts = [dy[begin:end].double().T @ x[begin:end].double() for begin, end in pairwise(ends)]
    empty = dy.new_zeros(0, dy.shape[1], x.shape[1], dtype=torch.float64)
    return torch.cat([empty, *(p.unsqueeze(0) for p in parts)])


INFOS = [
    OpInfo(
        name="grouped_matmul",
        cases=_cases,
        exact=_exact,
        grad_args=(0, 1, 3),
        bench_cases=lambda dtype: (_case(*shape, dtype, False) for shape in BENCH_SHAPES),
        bytes_moved=lambda x, weight, *_: x.nbytes + weight.nbytes,
        flops=lambda x, weight, *_: 2 * x.numel() * weight.shape[1],
    ),
    OpInfo(
        name="grouped_weight_grad",
        cases=_weight_grad_cases,
        exact=_weight_grad_exact,
        bench_cases=lambda dtype: (_weight_grad_case(*shape, dtype) for shape in BENCH_SHAPES),
        bytes_moved=lambda dy, x, *_: dy.nbytes + x.nbytes,
        flops=lambda dy, x, *_: 2 * dy.numel() * x.shape[1],
    ),
]
