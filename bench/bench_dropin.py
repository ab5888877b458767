"""Suite `dropin`: transformers models as they are and with one line, `fastllm.patch(model)`.

A dense model of SmolLM2-135M's shape and two small mixtures of experts, random weights, the same on
every side. Each side has a process of its own, and they take turns. The peers are transformers
uncompiled, with SDPA and `grouped_mm` (eager), with `experts_implementation="eager"`, and through
torch.compile. Int4 weights by `QuantConfig` stand beside the unpatched model in bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from fastllm.bench import dropin_steps as steps
from fastllm.bench.step_process import StepProcess
from fastllm.testing.suite import OURS, BenchCase, Row, Settings, Work, benchmark_case

SUITE = "dropin"
SECONDS = 600
TITLE = "transformers models unpatched and patched: speed and memory"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Point = tuple[str, str, str]  # model, work, dtype
INT4, INT4_TABLE = "generate int4", "generate int4, table q8_0"
_PACKED = dict(zip((INT4, INT4_TABLE), steps.PACKED, strict=True))  # work -> our side
# (model, work) -> peer -> how many times as fast the patched model has to be
BARS: dict[tuple[str, str], dict[str, float]] = {
    (steps.DENSE, steps.PREFILL): {steps.EAGER: 1.3},
    (steps.DENSE, steps.BACKWARD): {steps.EAGER: 1.3},
    (steps.DENSE, steps.STEP): {steps.EAGER: 1.3},
    (steps.DENSE, INT4): {steps.EAGER: 2.0},
    (steps.DENSE, INT4_TABLE): {steps.EAGER: 2.0},
    **{
        (name, work): {steps.LOOP: 2.0, steps.EAGER: 1.2 if "E=64" in name else 1.0}
        for name in steps.MIXTURES
        for work in (steps.BACKWARD, steps.STEP)
    },
}


def points(settings: Settings) -> list[Point]:
    """What is measured; quick runs: the dense model's prefill and step, and one mixture's step."""
    fine = next(iter(steps.MIXTURES))
    if settings.quick:
        return [
            (steps.DENSE, steps.PREFILL, "bf16"),
            (steps.DENSE, steps.BACKWARD, "bf16"),
            (steps.DENSE, steps.GENERATE, "bf16"),
            (steps.DENSE, INT4, "bf16"),
            (fine, steps.BACKWARD, "bf16"),
        ]
    works = (steps.PREFILL, steps.BACKWARD, steps.STEP, steps.GENERATE)
    found = [(steps.DENSE, work, "bf16") for work in (*works, INT4, INT4_TABLE)]
    found += [(steps.DENSE, work, "fp32") for work in works[:2]]
    return found + [(name, work, "bf16") for name in steps.MIXTURES for work in works]


def cases(settings: Settings) -> Iterator[BenchCase]:
    """The speed of every point, and on the CPU in full runs its memory."""
    for point in points(settings):
        model, work, dtype = point
        yield BenchCase(
            suite=SUITE,
            label=f"{model}, {_what(work)}",
            dtype=dtype,
            device=settings.device,
            seconds=4 if settings.quick else 15,
            min_rounds=3,
            make=functools.partial(_speed, settings, point),
        )
        if settings.device == "cpu" and not settings.quick:
            yield BenchCase(
                suite=SUITE,
                label=f"{model}, {_what(work)}, memory",
                dtype=dtype,
                min_rounds=1,
                seconds=0,
                make=functools.partial(_memory, settings, point),
            )


def sides(settings: Settings, point: Point) -> dict[str, str]:
    """Name in the row -> side of `dropin_steps`, ours first."""
    model, work, dtype = point
    if work in _PACKED:
        return {OURS: _PACKED[work], steps.EAGER: steps.EAGER, "patched bf16": steps.OURS}
    found = [steps.OURS, steps.EAGER]
    if model in steps.MIXTURES:
        found.append(steps.LOOP)
    # A mixture and decode with a growing cache take minutes to compile.
    elif not settings.quick and dtype == "bf16" and work in (steps.PREFILL, steps.BACKWARD):
        found.append(steps.COMPILED)
    return {name: name for name in found}


def summary(rows: Sequence[Row]) -> list[str]:
    """Each ratio that has a bar, beside it."""
    lines = []
    for (model, work), bars in BARS.items():
        for row in rows:
            if row.case != f"{model}, {_what(work)}" or row.dtype != "bf16":
                continue
            lines += [
                f"{row.case}: {row.ratio[peer]:.2f}x {peer} (bar {bar}x"
                f"{'' if row.ratio[peer] >= bar else ', missed'})"
                for peer, bar in bars.items()
                if peer in row.ratio
            ]
    return lines


def _what(work: str) -> str:
    """How tables name it."""
    if work == steps.PREFILL:
        return f"prefill {steps.LENGTH} tokens"
    if work == steps.GENERATE or work in _PACKED:
        return f"{work}, {steps.TOKENS} tokens"
    return f"{work}, {steps.ROWS} x {steps.LENGTH} tokens"


def _amount(work: str) -> int:
    """Tokens of one call."""
    if work == steps.PREFILL:
        return steps.LENGTH
    generates = work == steps.GENERATE or work in _PACKED
    return steps.TOKENS if generates else steps.ROWS * steps.LENGTH


def _speed(settings: Settings, point: Point) -> Work:
    return Work(
        functions={name: one.step for name, one in _processes(settings, point).items()},
        unit="tok/s",
        amount=_amount(point[1]),
        own_clock=True,
        notes=("eager: transformers uncompiled, SDPA, grouped_mm; everybody in the row's dtype",),
    )


def _memory(settings: Settings, point: Point) -> Work:
    return Work(
        functions={name: one.peak for name, one in _processes(settings, point).items()},
        unit="MB",
        own_clock=True,
        notes=("memory: the resident set's peak beyond the imports, the model included",),
    )


_running: dict[Point, dict[str, StepProcess]] = {}  # of one point at a time


def _processes(settings: Settings, point: Point) -> dict[str, StepProcess]:
    """Everybody's process, warm; those of another point end. Memory comes from those of speed."""
    if point not in _running:
        for process in [p for one in _running.values() for p in one.values()]:
            process.close()
        _running.clear()
        model, work, dtype = point
        work = steps.GENERATE if work in _PACKED else work
        started = _running.setdefault(point, {})
        for name, side in sides(settings, point).items():
            started[name] = steps.call_process(side, model, work, DTYPES[dtype], settings.device)
            started[name].step()  # it is warm before the next one starts
    return _running[point]


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_dropin(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
