"""Suite `ops`: every op at the bench shapes of its OpInfo, beside torch's op or its own definition.

The peer is "torch" where torch has the op, else "eager": the definition in plain PyTorch.
Arguments of more than 64 kB rotate over at least 128 MB, and those rows have a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm.ops.registry import OPS
from fastllm.testing.check import case_arguments, copies
from fastllm.testing.opinfo import Args, Case, OpInfo, all_infos
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case
from fastllm.testing.timing import rotation

SUITE = "ops"
SECONDS = 120
TITLE = "every op beside its PyTorch counterpart"
_CACHED_BYTES = 64 << 10
_MAX_COPIES = 512
# Their cases hold weights in the CPU's layout; suite `linear` packs for the device at hand.
_PACKED_FOR_THE_CPU = {"quant_matmul", "quant_embedding"}


def cases(settings: Settings) -> Iterator[BenchCase]:
    """All bench shapes in both dtypes; in quick runs the first shape of each op in bfloat16."""
    for info in all_infos().values():
        if info.bench_cases is None:
            continue
        if settings.device != "cpu" and info.name in _PACKED_FOR_THE_CPU:
            continue
        dtypes = info.dtypes[-1:] if settings.quick else info.dtypes
        for dtype in dtypes:
            for i, case in enumerate(info.bench_cases(dtype)):
                if settings.quick and i > 0:
                    break
                yield _bench_case(info, case, dtype, settings)


def _bench_case(info: OpInfo, case: Case, dtype: torch.dtype, settings: Settings) -> BenchCase:
    return BenchCase(
        suite=SUITE,
        label=f"{info.name} {case.label}",
        dtype=str(dtype).removeprefix("torch."),
        device=settings.device,
        seconds=0.2 if settings.quick else 0.8,
        make=lambda: _work(info, case, settings.device),
    )


def _work(info: OpInfo, case: Case, device: str) -> Work:
    args = tuple(
        arg.to(device) if isinstance(arg, Tensor) else arg for arg in case_arguments(info, case)
    )
    size = sum(arg.nbytes for arg in args if isinstance(arg, Tensor))
    large = size > _CACHED_BYTES
    op = OPS[info.name]
    peer, fn = ("torch", info.peer) if info.peer is not None else ("eager", op.ref)
    prepare: Callable[..., Args] = _as_they_are
    if info.bench_peer is not None:
        prepare, fn = info.bench_peer

    def ready(function: Callable[..., Any], prepare: Callable[..., Args]) -> Callable[[], Any]:
        if not large:
            own = prepare(*copies(args))
            return lambda: function(*own)
        inputs = rotation(lambda: prepare(*copies(args)), max(size, (128 << 20) // _MAX_COPIES))
        return lambda: function(*next(inputs))

    return Work(
        functions={OURS: ready(op, _as_they_are), peer: ready(fn, prepare)},
        nbytes=info.bytes_moved(*args) if info.bytes_moved and large else 0,
        flops=info.flops(*args) if info.flops and large else 0,
        kind="f32" if torch.float32 in {getattr(a, "dtype", None) for a in args[:2]} else "bf16",
    )


def _as_they_are(*args: Any) -> Args:
    return args


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_ops(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
