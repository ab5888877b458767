"""Cases of dequantize: every format, any bytes that are finite, bit for bit the reference's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops import packed_layout as layout
from ...ops.dequantize import dequantize_ref
from ...ops.quant_format import QUANT_FORMATS
from ..opinfo import Args, Case, OpInfo
from ..packed_weights import random_packed

SHAPES = ((1, 256), (17, 512))


def _case(format: str, n: int, k: int, dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        data, scales = random_packed(g, format, n, k, layout.ROWS_PER_GROUP["cpu"])
        return data, scales, format, n, k, dtype

    return Case(label=f"{format}-{n}x{k}-{str(dtype).removeprefix('torch.')}", make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    yield _case("q4_k", 0, 256, dtype)
    for format in layout.QUANTIZED:
        for n, k in SHAPES if dtype == torch.float32 else SHAPES[-1:]:
            yield _case(format, n, k + QUANT_FORMATS[format].multiple % 256, dtype)


def _bytes(data: Tensor, scales: Tensor, format: str, n: int, k: int, dtype: torch.dtype) -> int:
    return data.nbytes + scales.nbytes + n * k * dtype.itemsize


INFOS = [
    OpInfo(
        name="dequantize",
        cases=_cases,
        exact=dequantize_ref,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        bitwise=True,
        bench_cases=lambda dtype: (
            _case(format, 1536, 1024, dtype) for format in ("q4_0", "q4_k", "q6_k", "nf4", "fp8")
        ),
        bytes_moved=_bytes,
        variants=layout.QUANTIZED,
    ),
]
