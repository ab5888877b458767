"""Cases of quantize: every format, with and without importances, bit for bit the reference's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops import packed_layout as layout
from ...ops.quant_format import QUANT_FORMATS
from ...ops.quantize import quantize_ref
from ..opinfo import Args, Case, OpInfo

# (n, k / 256): broken groups of 16 rows, several super-blocks, several tiles of 128 rows
SHAPES = ((1, 1), (130, 1))
BENCH_SHAPE = (1536, 4)


def weights(g: torch.Generator, n: int, k: int) -> Tensor:
    """Rows of different sizes: normal, zero, tiny, with an outlier, with blocks of zeros; constants
    of both signs, in whole rows and single blocks; values far from zero."""
    w = 0.05 * torch.randn(n, k, generator=g)
    if n > 4:
        w[0] = 0.0
        w[1] *= 1e-6
        w[2, k // 3] = 7.0
        w[3, 32:64] = 0.0
        w[4] = w[4].abs()
    if n > 11:
        w[5], w[6] = 0.05, -0.05
        w[7, 32:64], w[8, 32:64] = 0.05, -0.05
        w[9] = 1.0 + 0.1 * w[9]
        w[10] = 1.0 + 0.02 * w[10]
        w[11] += 50.0
    return w


def _case(
    format: str, n: int, k: int, dtype: torch.dtype, importance: tuple[int, ...] | None
) -> Case:
    def make(g: torch.Generator) -> Args:
        w = weights(g, n, k).to(dtype)
        if importance is None:
            return w, format, None
        weight = torch.rand(importance, generator=g).pow(3)
        weight[..., 32:64] = 0.0
        weight[..., 64:128], weight[..., 70] = 0.0, 1.0  # one column of a block counts
        weight[..., 96:128], weight[..., 100] = 1e-8, 1.0
        return w, format, weight

    name = "" if importance is None else f"-importance{len(importance)}d"
    return Case(label=f"{format}-{n}x{k}{name}", make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    yield _case("q4_k", 0, 256, dtype, None)
    for i, format in enumerate(layout.QUANTIZED):
        # one block more than whole super-blocks where the format allows it
        rest = QUANT_FORMATS[format].multiple % 256
        if dtype == torch.float32:
            for n, supers in SHAPES:
                yield _case(format, n, 256 * supers + rest, dtype, None)
        n, k = 19, 512 + rest
        if QUANT_FORMATS[format].scale_dtype == torch.float32:
            yield _case(format, n, k, dtype, None)
        else:
            of_values = (i + dtype.itemsize // 2) % 2
            yield _case(format, n, k, dtype, (n, k) if of_values else (k,))


def _bytes(w: Tensor, format: str, importance: Tensor | None) -> int:
    kind = QUANT_FORMATS[format]
    return w.nbytes + int(w.numel() * kind.bits_per_weight(w.shape[1]) / 8)


INFOS = [
    OpInfo(
        name="quantize",
        cases=_cases,
        exact=quantize_ref,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        bitwise=True,
        bench_cases=lambda dtype: (
            _case(format, BENCH_SHAPE[0], 256 * BENCH_SHAPE[1], dtype, None)
            for format in ("q4_0", "q4_k", "q6_k", "int4_g128", "int8", "nf4", "fp8")
        ),
        bytes_moved=_bytes,
        variants=layout.QUANTIZED,
    ),
]
