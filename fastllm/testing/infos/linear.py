"""Cases of linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..opinfo import Args, Case, OpInfo

# (m, n, k): every tile remainder of rows and panels, odd columns, nothing at all
SHAPES = (
    (0, 17, 33),
    (1, 1, 1),
    (1, 100, 576),
    (2, 16, 31),
    (3, 15, 3),
    (5, 17, 64),
    (8, 33, 96),
    (6, 31, 320),
    (12, 40, 544),
    (20, 37, 64),
    (17, 100, 33),
    (33, 48, 70),
    (25, 0, 8),
    (4, 5, 0),
)
BENCH_SHAPES = tuple(
    (m, n, k) for m in (1, 8, 512) for n, k in ((576, 576), (3072, 576), (576, 1536), (4096, 4096))
)


def _case(m: int, n: int, k: int, dtype: torch.dtype, bias: bool) -> Case:
    def make(g: torch.Generator) -> Args:
        x = torch.randn(m, k, generator=g).to(dtype)
        weight = torch.randn(n, k, generator=g).to(dtype)
        return x, weight, torch.randn(n, generator=g).to(dtype) if bias else None, None

    return Case(label=f"{m}x{n}x{k}" + ("-bias" if bias else ""), make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        yield _case(*shape, dtype, bias=i % 2 == 0)

    def strided(g: torch.Generator) -> Args:
        x = torch.randn(7, 80, generator=g).to(dtype)[:, 5:70]
        weight = torch.randn(20, 90, generator=g).to(dtype)[:, 3:68]
        return x, weight, torch.randn(20, generator=g), torch.float32

    def batched(g: torch.Generator) -> Args:
        x, weight = torch.randn(2, 3, 40, generator=g), torch.randn(18, 40, generator=g)
        return x.to(dtype), weight.to(dtype), None, torch.bfloat16

    yield Case(label="strided-f32-out", make=strided)
    yield Case(label="3d-bf16-out", make=batched)


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: object) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def _peer(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y.to(out_dtype or x.dtype)


INFOS = [
    OpInfo(
        name="linear",
        cases=_cases,
        exact=_exact,
        peer=_peer,
        grad_args=(0, 1),
        bench_cases=lambda dtype: (_case(*shape, dtype, bias=False) for shape in BENCH_SHAPES),
        bytes_moved=lambda x, weight, *_: x.nbytes + weight.nbytes,
        flops=lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
    ),
]
