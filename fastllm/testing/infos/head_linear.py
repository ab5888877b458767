"""Cases of head_linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..opinfo import Args, Case, OpInfo

# tokens, heads, n, k, tail
SHAPES = (
    (1, 1, 1, 1, 0),
    (3, 5, 37, 19, 8),
    (13, 2, 64, 128, 16),
    (1, 16, 128, 512, 0),
    (70, 3, 33, 24, 3),
    (0, 4, 16, 32, 8),
)
FULL_SHAPES = tuple(
    (tokens, heads, n, k, tail)
    for tokens in (1, 2, 5, 130)
    for heads in (1, 16)
    for n, k, tail in ((512, 128, 64), (128, 512, 0), (40, 24, 16), (15, 17, 1))
)
BENCH_SHAPES = ((1, 16, 512, 128, 64), (512, 16, 512, 128, 64), (1, 16, 128, 512, 0))


def _case(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, full: bool = False) -> Case:
    tokens, heads, n, k, tail_dim = shape

    def make(g: torch.Generator) -> Args:
        # x and tail as views of wider rows, the weight as part of a taller one
        rows = torch.randn(tokens, heads, k + 8, generator=g).to(dtype)
        if transposed:
            weight = torch.randn(heads, k + 3, n, generator=g).to(dtype)[:, :k].mT
        else:
            weight = torch.randn(heads, n + 3, k, generator=g).to(dtype)[:, 3:]
        tail = torch.randn(tokens, heads, tail_dim + 8, generator=g).to(dtype)[..., :tail_dim]
        return rows[..., 8:], weight, tail if tail_dim else None

    label = "x".join(map(str, shape)) + ("-transposed" if transposed else "")
    return Case(label=label, make=make, full=full)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for transposed in (False, True):
        for shape in SHAPES:
            yield _case(shape, dtype, transposed)
        for shape in FULL_SHAPES:
            yield _case(shape, dtype, transposed, full=True)


def _with_tail(y: Tensor, tail: Tensor | None) -> Tensor:
    return y if tail is None else torch.cat((y, tail.to(y.dtype)), dim=-1)


def _exact(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    return _with_tail(torch.einsum("thk,hnk->thn", x.double(), weight.double()), tail)


def _peer(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    return _with_tail(torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1), tail)


def _cost(per: Callable[..., int]) -> Callable[..., int]:
    return lambda x, weight, tail=None: per(x.shape[0], *weight.shape)


def _bytes(x: Tensor, weight: Tensor, tail: Any = None) -> int:
    return x.nbytes + weight.nbytes + x.shape[0] * weight.shape[:2].numel() * x.element_size()


INFOS = [
    OpInfo(
        name="head_linear",
        cases=_cases,
        exact=_exact,
        peer=_peer,
        grad_args=(0, 1),
        bench_cases=lambda dtype: (_case(s, dtype, i < 2) for i, s in enumerate(BENCH_SHAPES)),
        flops=_cost(lambda tokens, heads, n, k: 2 * tokens * heads * n * k),
        bytes_moved=_bytes,
    ),
]
