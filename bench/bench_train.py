"""Suite `train`: tokens a second, MFU and memory of a training step, beside transformers.

A step is forward, loss, backward and AdamW, on the same random models and the same batch of full
rows. The bound is the machine's best bfloat16 product, so `percent_of_bound` is the MFU. fastllm
keeps float32 masters and float32 gradients of its bfloat16 parameters; transformers runs in
whichever of bfloat16 (without masters) and float32 is faster for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fastllm.bench import peers, training
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case

SUITE = "train"
SECONDS = 1500
TITLE = "tokens a second, MFU and memory of a training step"
MEASURED = ("10M", "50M", "135M")
BATCHES = ((2, 512), (1, 2048))
COMPILED = "transformers compiled"


def cases(settings: Settings) -> Iterator[BenchCase]:
    """10M at 2 x 512 tokens; in full runs all sizes and batches, full and LoRA, and memory."""
    points = [("10M", "full", 2, 512)]
    if not settings.quick:
        points = [
            (size, method, *shape)
            for size in MEASURED
            for method in ("full", "lora")
            for shape in BATCHES
        ]
    yield from (step_case(settings, *point) for point in points)
    if settings.device != "cpu" or settings.quick:
        return
    for point in points:
        yield BenchCase(
            suite=SUITE,
            label=f"{_label(*point)}, memory",
            dtype="bf16",
            min_rounds=1,
            seconds=0,
            make=functools.partial(_memory, *point),
        )


def step_case(settings: Settings, size: str, method: str, rows: int, length: int) -> BenchCase:
    """The speed of one step. size: of `training.SIZES`. method: "full" or "lora"."""
    return BenchCase(
        suite=SUITE,
        label=_label(size, method, rows, length),
        dtype="bf16",
        device=settings.device,
        seconds=5 if settings.quick else 20,
        min_rounds=3,
        make=functools.partial(_speed, settings, size, method, rows, length),
    )


def _label(size: str, method: str, rows: int, length: int) -> str:
    return f"{size} {method}, {rows} x {length} tokens"


def _speed(settings: Settings, size: str, method: str, rows: int, length: int) -> Work:
    config, device = training.SIZES[size], settings.device
    ids = training.batch(config, rows, length)
    functions: dict[str, Callable[[], Any]] = {
        OURS: training.fastllm_step(config, ids, method, device)
    }
    notes = []
    if peers.has_transformers() and (method == "full" or find_spec("peft") is not None):
        dtype = faster_dtype(size, method, rows, length, device)
        make = functools.partial(training.transformers_step, config, ids, method, device, dtype)
        functions["transformers"] = make()
        notes.append(f"transformers: {dtype}, SDPA, fused AdamW without masters; freed memory kept")
        if not settings.quick and method == "full":
            functions[COMPILED] = make(compiled=True)
    return Work(
        functions=functions,
        unit="tok/s",
        amount=rows * length,
        flops=training.flops(config, rows, length, method),
        notes=tuple(notes),
    )


@functools.cache
def faster_dtype(size: str, method: str, rows: int, length: int, device: str) -> torch.dtype:
    """Of bfloat16 and float32 the one in which transformers takes a step sooner."""
    if device != "cpu":
        return torch.bfloat16
    seconds = {}
    config = training.SIZES[size]
    ids = training.batch(config, rows, length)
    for dtype in (torch.bfloat16, torch.float32):
        step = training.transformers_step(config, ids, method, device, dtype)
        step()
        start = time.perf_counter()
        step()
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


def _memory(size: str, method: str, rows: int, length: int) -> Work:
    point = (size, method, rows, length)
    functions = {OURS: training.memory_step(OURS, *point, "bfloat16")}
    notes = ["the resident set's peak beyond the imports, three steps in a fresh process"]
    if peers.has_transformers():
        dtype = str(faster_dtype(*point, "cpu")).removeprefix("torch.")
        functions["transformers"] = training.memory_step("transformers", *point, dtype)
        notes.append(f"transformers: {dtype}")
    return Work(functions=functions, unit="MB", own_clock=True, notes=tuple(notes))


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_train(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
