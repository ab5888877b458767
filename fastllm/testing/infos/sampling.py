"""Cases of sampling, log_probs and top_log_probs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops.sampling import processed_logits, sampling_ref
from ..opinfo import Args, Case, OpInfo

SHAPES = ((1, 1), (3, 7), (2, 512), (5, 513), (4, 1500), (0, 64))
BENCH_SHAPES = ((1, 49152), (8, 49152), (1, 151936))


def row_parameters(
    g: torch.Generator,
    rows: int,
    vocab: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalized: bool = False,
    banned: int = 0,
) -> list[Tensor]:
    """The arguments of `sampling` after the logits: the same settings in every row.

    Args:
        g: draws seeds, positions, counts, prompts and banned ids.
        rows: rows of the logits.
        vocab: columns of the logits.
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        penalized: use all three penalties.
        banned: ids banned in each row.
    """

    def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype)

    counted = rows if penalized else 0
    return [
        full(temperature),
        full(top_k, torch.int32),
        full(top_p),
        full(min_p),
        full(1.3 if penalized else 1.0),
        full(0.4 if penalized else 0.0),
        full(0.2 if penalized else 0.0),
        torch.randint(-(2**62), 2**62, (rows,), generator=g),
        torch.randint(0, 2**31 - 1, (rows,), generator=g, dtype=torch.int32),
        full(penalized, torch.uint8),
        torch.randint(0, 3, (counted, vocab), generator=g, dtype=torch.int32),
        torch.randint(0, 2, (counted, vocab), generator=g, dtype=torch.uint8),
        torch.randint(-1, vocab - 1, (rows, banned), generator=g, dtype=torch.int32)
        if vocab > 1
        else torch.full((rows, banned), -1, dtype=torch.int32),
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "warm": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8, "temperature": 1.5},
    "min-p": {"min_p": 0.1},
    "all": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "penalized": True,
        "banned": 3,
    },
    "greedy-penalized": {"temperature": 0.0, "penalized": True, "banned": 2},
}


def _logits(g: torch.Generator, rows: int, vocab: int) -> Tensor:
    return 3.0 * torch.randn(rows, vocab, generator=g)


def _sampling_case(shape: tuple[int, int], setting: str) -> Case:
    def make(g: torch.Generator) -> Args:
        return _logits(g, *shape), *row_parameters(g, *shape, **SETTINGS[setting])

    return Case(label=f"{shape[0]}x{shape[1]}-{setting}", make=make)


def _sampling_cases(dtype: torch.dtype) -> Iterator[Case]:
    for setting in SETTINGS:
        yield _sampling_case((4, 1500), setting)
    for shape in SHAPES:
        yield _sampling_case(shape, "warm")
        yield _sampling_case(shape, "all")

    def rows_with_a_stride(g: torch.Generator) -> Args:
        return _logits(g, 3, 640)[:, :600], *row_parameters(g, 3, 600, top_k=9)

    yield Case(label="strided-rows", make=rows_with_a_stride)


def _sampling_exact(logits: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    # Processed logits are rounded to fp32 by definition; the statistics of both are exact here.
    counts_before = params[10].clone()
    ids = sampling_ref(logits, *params)[0]
    temperature, repetition, presence, frequency = params[0], *params[4:7]
    penalized, in_prompt, banned = params[9], params[11], params[12]
    z = processed_logits(
        logits,
        temperature,
        repetition,
        presence,
        frequency,
        penalized,
        counts_before,
        in_prompt,
        banned,
    )
    at = ids.long()[:, None]
    return ids, *(torch.log_softmax(x.double(), 1).gather(1, at)[:, 0] for x in (logits, z))


def _log_probs_case(shape: tuple[int, int], dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        ids = torch.randint(0, shape[1], (shape[0], 3), generator=g)
        return _logits(g, *shape), ids.to(dtype)

    return Case(label=f"{shape[0]}x{shape[1]}-{str(dtype)[6:]}", make=make)


def _log_probs_exact(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), 1).gather(1, ids.long())


def _top_case(shape: tuple[int, int], k: int) -> Case:
    def make(g: torch.Generator) -> Args:
        # Rounded to quarters: many ties.
        return torch.round(4.0 * _logits(g, *shape)) / 4.0, k

    return Case(label=f"{shape[0]}x{shape[1]}-{k}", make=make)


def _top_cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        for k in {0, 1, min(5, shape[1]), shape[1]}:
            yield _top_case(shape, k)


def _top_exact(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.log_softmax(logits.double(), 1).gather(1, order), order.int()


INFOS = [
    OpInfo(
        name="sampling",
        cases=_sampling_cases,
        exact=_sampling_exact,
        dtypes=(torch.float32,),
        bench_cases=lambda dtype: (
            _sampling_case(shape, setting)
            for shape in BENCH_SHAPES
            for setting in ("greedy", "warm", "all")
        ),
        bytes_moved=lambda logits, *_: logits.nbytes,
    ),
    OpInfo(
        name="log_probs",
        cases=lambda dtype: (
            _log_probs_case(shape, ids) for shape in SHAPES for ids in (torch.int32, torch.int64)
        ),
        exact=_log_probs_exact,
        dtypes=(torch.float32,),
        grad_args=(0,),
        bench_cases=lambda dtype: (_log_probs_case(shape, torch.int32) for shape in BENCH_SHAPES),
        bytes_moved=lambda logits, *_: logits.nbytes,
    ),
    OpInfo(
        name="top_log_probs",
        cases=_top_cases,
        exact=_top_exact,
        dtypes=(torch.float32,),
        bench_cases=lambda dtype: (_top_case(shape, 20) for shape in BENCH_SHAPES),
        bytes_moved=lambda logits, *_: logits.nbytes,
    ),
]
