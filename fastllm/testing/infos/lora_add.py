"""Cases of lora_add."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.lora_add import lora_add_ref
from ..opinfo import Args, Case, OpInfo

# (m, n, r): ranks of whole and of broken vectors, a rank of none, rows of every tile
SHAPES = (
    (1, 100, 16),
    (3, 33, 8),
    (5, 17, 1),
    (8, 48, 33),
    (33, 70, 64),
    (2, 20, 0),
    (0, 5, 4),
    (4, 0, 4),
)
BENCH_SHAPES = ((1, 1536, 16), (1024, 1536, 16), (1024, 576, 64))


def _case(m: int, n: int, r: int, dtype: torch.dtype, scale: float) -> Case:
    def make(g: torch.Generator) -> Args:
        t, b = torch.randn(m, r, generator=g).to(dtype), torch.randn(n, r, generator=g).to(dtype)
        return t, b, torch.randn(m, n, generator=g), scale, None

    return Case(label=f"{m}x{n}x{r}", make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        yield _case(*shape, dtype, scale=(2.0, 0.3)[i % 2])

    def member_of_a_group(g: torch.Generator) -> Args:
        base = torch.randn(7, 90, generator=g)[:, 32:64]
        t, b = torch.randn(7, 12, generator=g), torch.randn(32, 12, generator=g)
        return t.to(dtype), b.to(dtype), base, 0.5, torch.float32

    def batched(g: torch.Generator) -> Args:
        t, b = torch.randn(2, 3, 16, generator=g), torch.randn(18, 16, generator=g)
        return t.to(dtype), b.to(dtype), torch.randn(2, 3, 18, generator=g), 4.0, torch.bfloat16

    yield Case(label="member-f32-out", make=member_of_a_group)
    yield Case(label="3d-bf16-out", make=batched)


def _exact(t: Tensor, b: Tensor, base: Tensor, scale: float, out_dtype: object) -> Tensor:
    return base.double() + scale * (t.double() @ b.double().T)


INFOS = [
    OpInfo(
        name="lora_add",
        cases=_cases,
        exact=_exact,
        peer=lora_add_ref,
        grad_args=(0, 1, 2),
        bench_cases=lambda dtype: (_case(*shape, dtype, scale=2.0) for shape in BENCH_SHAPES),
        bytes_moved=lambda t, b, base, *_: t.nbytes + b.nbytes + base.nbytes * 3 // 2,
        flops=lambda t, b, *_: 2 * t.numel() * b.shape[0],
    ),
]
