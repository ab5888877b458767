"""Cases of embedding_backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..opinfo import Args, Case, OpInfo

# ids, rows of the table, columns: every id is met, most ids repeat, hardly any is met.
SHAPES = (((40,), 17, 64), ((3, 30), 5, 33), ((50,), 3000, 20), ((0,), 4, 8), ((4,), 1, 1))


def _case(
    shape: tuple[tuple[int, ...], int, int],
    dtype: torch.dtype,
    ids: torch.dtype,
    out: torch.dtype,
) -> Case:
    ids_shape, n, k = shape

    def make(g: torch.Generator) -> Args:
        places = torch.randint(0, n, ids_shape, generator=g).to(ids)
        return torch.randn(*ids_shape, k, generator=g).to(dtype), places, n, out

    return Case(label=f"{n}x{k}-{len(ids_shape)}d-{ids}-{out}".replace("torch.", ""), make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        out = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        yield _case(shape, dtype, torch.int32 if i % 2 else torch.int64, out)

    def outside(g: torch.Generator) -> Args:
        dy = torch.randn(6, 20, generator=g).to(dtype)
        return dy, torch.tensor([-1, 3, 7, 1 << 40, 3, -(1 << 40)]), 7, torch.float32

    def no_table(g: torch.Generator) -> Args:
        return torch.randn(2, 4, generator=g).to(dtype), torch.tensor([0, 1]), 0, torch.float32

    yield Case(label="ids-outside-add-nothing", make=outside)
    yield Case(label="no-rows", make=no_table)


def _exact(dy: Tensor, ids: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    sums = torch.zeros(n, dy.shape[-1], dtype=torch.float64)
    for id, row in zip(ids.flatten().tolist(), dy.double().flatten(0, -2), strict=True):
        if 0 <= id < n:
            sums[id] += row
    return sums


def _torch_prepare(dy: Tensor, ids: Tensor, n: int, dtype: torch.dtype) -> Args:
    return dy.to(dtype), ids, n


def _torch_gradient(dy: Tensor, ids: Tensor, n: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, ids, n, -1, False)


INFOS = [
    OpInfo(
        name="embedding_backward",
        cases=_cases,
        exact=_exact,
        bench_cases=lambda dtype: iter(
            [_case(((2048,), 49152, 576), dtype, torch.int64, torch.float32)]
        ),
        bench_peer=(_torch_prepare, _torch_gradient),
        bytes_moved=lambda dy, ids, n, dtype: dy.nbytes + n * dy.shape[-1] * dtype.itemsize,
    ),
]
