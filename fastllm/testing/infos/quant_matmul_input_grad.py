"""Cases of quant_matmul_input_grad: every quantized format, broken groups of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...ops import packed_layout as layout
from ..opinfo import Args, Case, OpInfo
from ..packed_weights import FIRST_FORMATS, random_packed, weight64, whole

# (m, n, k): tiles of few and many rows, groups of 16 rows cut anywhere, odd numbers of rows
SHAPES = ((0, 17, 64), (1, 1, 32), (2, 100, 96), (5, 15, 64), (17, 33, 32), (40, 48, 96))
BENCH_SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (1024, 960, 576))


def _case(shape: tuple[int, int, int], dtype: torch.dtype, format: str) -> Case:
    m, n, k = *shape[:2], whole(format, shape[2])

    def make(g: torch.Generator) -> Args:
        dy = torch.randn(m, n, generator=g).to(dtype)
        data, scales = random_packed(g, format, n, k, layout.ROWS_PER_GROUP["cpu"])
        return dy, data, scales, format, None

    return Case(label=f"{format}-{m}x{n}x{k}", make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for format in layout.QUANTIZED:
        for i, shape in enumerate(SHAPES):
            full = format not in FIRST_FORMATS and i % 3 != 1
            yield replace(_case(shape, dtype, format), full=full)

    def batched(g: torch.Generator) -> Args:
        dy = torch.randn(2, 3, 60, generator=g).to(dtype)[..., 8:48]
        data, scales = random_packed(g, "q4_1", 40, 64, layout.ROWS_PER_GROUP["cpu"])
        return dy, data, scales, "q4_1", torch.float32

    yield Case(label="3d-strided-f32-out", make=batched)


def _weight(dy: Tensor, data: Tensor, scales: Tensor, format: str) -> Tensor:
    return weight64(data, scales, format, dy.shape[-1], layout.columns_of(data, format))


def _exact(dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: Any) -> Tensor:
    return dy.double() @ _weight(dy, data, scales, format)


def _peer(dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: Any) -> Tensor:
    weight = _weight(dy, data, scales, format).to(dy.dtype)
    return (dy @ weight).to(out_dtype or dy.dtype)


def _bench_inputs(dy: Tensor, data: Tensor, scales: Tensor, format: str, out_dtype: Any) -> Args:
    return dy, _weight(dy, data, scales, format).to(dy.dtype)


INFOS = [
    OpInfo(
        name="quant_matmul_input_grad",
        cases=_cases,
        exact=_exact,
        peer=_peer,
        bench_cases=lambda dtype: (
            _case(shape, dtype, format) for format in ("q4_1", "q8_0") for shape in BENCH_SHAPES
        ),
        bench_peer=(_bench_inputs, torch.matmul),
        bytes_moved=lambda dy, data, scales, *_: dy.nbytes + data.nbytes + scales.nbytes,
        flops=lambda dy, data, scales, format, *_: 2 * dy.numel() * layout.columns_of(data, format),
        variants=layout.QUANTIZED,
    ),
]
