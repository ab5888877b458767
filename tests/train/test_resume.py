"""Interrupted runs: what they leave behind, and that going on gives the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STEPS = 30


def records(out: Path) -> list[dict[str, Any]]:
    """The metrics without what time decides."""
    timed = ("seconds", "tokens_per_second", "mfu")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint: weights, masters, moments, random states."""
    files = list(checkpoint.rglob("*.safetensors"))
    assert len(files) == 2, files
    found = {k: v for f in files for k, v in load_file(f).items()}
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in found.items()}


def reached(out: Path, step: int) -> bool:
    """Whether the metrics of a step are written."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and f'{{"step": {step}, "loss"' in metrics.read_text()


def newest(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step-*"))[-1]


def more(*words: str) -> tuple[str, ...]:
    return (
        f"loop.steps={STEPS}", "loop.save_every=3", "loop.eval_every=10", "loop.sample_every=20",
        "sample.max_tokens=4", "data.eval_rows=2", *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny: Any, runner: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert runner.run(["pretrain", *tiny.words(out, *more())]) == 0, runner.log.read_text()
    return out


@pytest.mark.parametrize(("kills", "seed"), [(3, 0), pytest.param(20, 1, marks=pytest.mark.full)])
def test_a_run_killed_at_random_moments_gives_the_bits_of_the_whole_one(
    kills: int, seed: int, tiny: Any, runner: Any, whole: Path, tmp_path: Path
) -> None:
    moments, out = random.Random(seed), tmp_path / "run"
    words = tiny.words(out, *more("loop.resume=auto"))
    statuses = []
    for step in sorted(moments.choices(range(STEPS - 3), k=kills)):
        pid = runner.start(["pretrain", *words])
        # Somewhere in the step after `step`; a step takes some 10 ms, and a checkpoint more.
        while step and not reached(out, step):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03 if step else 0.3))
        os.kill(pid, signal.SIGKILL)
        statuses.append(runner.wait(pid))
    # On a busy machine one may have come to its end first.
    assert set(statuses) <= {0, -signal.SIGKILL}, runner.log.read_text()
    assert statuses.count(-signal.SIGKILL) > kills // 2, statuses
    assert runner.run(["pretrain", *words]) == 0, runner.log.read_text()
    assert records(out) == records(whole)
    assert tensors(newest(out)) == tensors(newest(whole))


def test_evaluation_and_samples_leave_training_as_it_is(
    tiny: Any, runner: Any, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = tiny.words(out, *more("loop.eval_every=0", "loop.sample_every=0"))
    assert runner.run(["pretrain", *words]) == 0, runner.log.read_text()
    trained = [r for r in records(whole) if "loss" in r]
    assert len(trained) == STEPS and records(out) == trained
    assert tensors(newest(out)) == tensors(newest(whole))
    assert any("samples" in r for r in records(whole))
    assert any("bits_per_byte" in r for r in records(whole))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_with_0(
    number: signal.Signals, tiny: Any, runner: Any, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = tiny.words(out, *more("loop.save_every=0", "loop.resume=auto"))
    pid = runner.start(["pretrain", *words])
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        time.sleep(0.01)
    os.kill(pid, number)
    assert runner.wait(pid) == 0, runner.log.read_text()
    last = max(r["step"] for r in records(out))
    assert last < STEPS and newest(out).name == f"step-{last:06d}"
    assert runner.run(["pretrain", *words]) == 0, runner.log.read_text()
    trained = [r for r in records(out) if "loss" in r]
    assert trained == [r for r in records(whole) if "loss" in r]
    assert tensors(newest(out)) == tensors(newest(whole))
