"""Cases of embedding and quant_embedding: copies and exact products, compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops import packed_layout as layout
from ...ops.embedding import quant_embedding_ref
from ..opinfo import Args, Case, OpInfo
from ..packed_weights import random_packed, whole

SHAPES = (((5,), 17, 64), ((2, 3), 100, 33), ((0,), 4, 8), ((4,), 1, 1))


def _dense_case(
    shape: tuple[tuple[int, ...], int, int],
    dtype: torch.dtype,
    ids: torch.dtype,
    out: torch.dtype,
) -> Case:
    ids_shape, n, k = shape

    def make(g: torch.Generator) -> Args:
        table = torch.randn(n, k, generator=g).to(dtype)
        return torch.randint(0, n, ids_shape, generator=g).to(ids), table, out

    return Case(label=f"{n}x{k}-{len(ids_shape)}d-{ids}-{out}".replace("torch.", ""), make=make)


def _dense_cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        ids = torch.int32 if i % 2 else torch.int64
        for out in (torch.float32, torch.bfloat16):
            yield _dense_case(shape, dtype, ids, out)

    def outside(g: torch.Generator) -> Args:
        return torch.tensor([-1, 3, 7, 1 << 40]), torch.randn(7, 20, generator=g).to(dtype), dtype

    if dtype != torch.float16:
        yield Case(label="ids-outside-give-zeros", make=outside)


def _exact(ids: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    inside = (ids >= 0) & (ids < weight.shape[0])
    rows = weight.double()[torch.where(inside, ids, 0).long()]
    return torch.where(inside.unsqueeze(-1), rows, 0.0)


def _packed_case(format: str, n: int, k: int, out: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        data, scales = random_packed(g, format, n, k, layout.ROWS_PER_GROUP["cpu"])
        return torch.randint(-1, n + 1, (9,), generator=g), data, scales, format, n, out

    return Case(label=f"{format}-{n}x{k}-{str(out).removeprefix('torch.')}", make=make)


def _packed_cases(dtype: torch.dtype) -> Iterator[Case]:
    for format in layout.FORMATS:
        for n, k in ((1, 32), (17, 64), (100, 96)):
            yield _packed_case(format, n, whole(format, k), dtype)


INFOS = [
    OpInfo(
        name="embedding",
        cases=_dense_cases,
        exact=_exact,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        grad_args=(1,),
        bitwise=True,
        bench_cases=lambda dtype: iter(
            [_dense_case(((512,), 49152, 576), dtype, torch.int32, torch.float32)]
        ),
        bytes_moved=lambda ids, weight, out: ids.numel() * weight.shape[1] * 8,
    ),
    OpInfo(
        name="quant_embedding",
        cases=_packed_cases,
        exact=quant_embedding_ref,
        bitwise=True,
        bench_cases=lambda dtype: iter([_packed_case("q8_0", 49152, 576, dtype)]),
        bytes_moved=lambda ids, data, *_: ids.numel() * layout.columns_of(data, "q8_0") * 8,
        variants=layout.FORMATS,
    ),
]
