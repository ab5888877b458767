"""Suite `train`: tokens a second, MFU and memory of a training step, beside transformers.

A step is forward, loss, backward and AdamW, on the same random models and the same batch of full
rows; each peer has a process of its own, and they take turns. The bound is the machine's best
bfloat16 product, so `percent_of_bound` is the MFU. fastllm keeps float32 masters and float32
gradients of its bfloat16 parameters; transformers runs in whichever of bfloat16 (without masters)
and float32 is faster for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fastllm.bench import peers, training
from fastllm.bench.step_process import StepProcess
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case

SUITE = "train"
SECONDS = 1200
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
    compiled = not settings.quick and method == "full"
    dtype, functions = _peers(settings.device, compiled, size, method, rows, length)
    return Work(
        functions={name: process.step for name, process in functions.items()},
        unit="tok/s",
        amount=rows * length,
        flops=training.flops(training.SIZES[size], rows, length, method),
        own_clock=True,
        notes=(f"transformers: {dtype}, SDPA, fused AdamW without masters",) if dtype else (),
    )


def _memory(size: str, method: str, rows: int, length: int) -> Work:
    dtype, functions = _peers("cpu", False, size, method, rows, length)
    notes = ["the resident set's peak beyond the imports, three steps in a fresh process"]
    if dtype:
        notes.append(f"transformers: {dtype}")
    return Work(
        functions={name: process.peak for name, process in functions.items()},
        unit="MB",
        own_clock=True,
        notes=tuple(notes),
    )


_running: list[StepProcess] = []  # of one case at a time


def _start(peer: str, *point: Any) -> StepProcess:
    process = training.step_process(peer, *point)
    _running.append(process)
    process.step()  # it is warm before the next one starts
    return process


def _peers(
    device: str, compiled: bool, size: str, method: str, rows: int, length: int
) -> tuple[torch.dtype | None, dict[str, StepProcess]]:
    """The dtype of transformers, None without it, and everybody's process; ends earlier ones."""
    while _running:
        _running.pop().close()
    point = (size, method, rows, length)
    dtype, names = None, []
    if peers.has_transformers() and (method == "full" or find_spec("peft") is not None):
        dtype = faster_dtype(*point, device)
        names = ["transformers", *([COMPILED] if compiled else [])]
    functions = {OURS: _start(OURS, *point, torch.bfloat16, device)}
    for name in names:
        functions[name] = _start(name, *point, dtype, device)
    return dtype, functions


@functools.cache
def faster_dtype(size: str, method: str, rows: int, length: int, device: str) -> torch.dtype:
    """Of bfloat16 and float32 the one in which transformers takes a step sooner."""
    if device != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        process = training.step_process("transformers", size, method, rows, length, dtype, device)
        seconds[dtype] = process.step()
        process.close()
    return min(seconds, key=lambda dtype: seconds[dtype])


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_train(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
