"""Interrupted runs: what they leave behind, and that going on gives the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
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


def newest(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step-*"))[-1]


def more(*words: str) -> tuple[str, ...]:
    return (
        f"loop.steps={STEPS}", "loop.save_every=3", "loop.eval_every=10", "loop.sample_every=20",
        "sample.max_tokens=4", "data.eval_rows=2", *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny: Any, runner: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run without interruption, and how long it took."""
    out = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    assert runner.run(["pretrain", *tiny.words(out, *more())]) == 0, runner.log.read_text()
    return out, time.monotonic() - began


@pytest.mark.parametrize(("kills", "seed"), [(3, 0), pytest.param(20, 1, marks=pytest.mark.full)])
def test_a_run_killed_at_random_moments_gives_the_bits_of_the_whole_one(
    kills: int, seed: int, tiny: Any, runner: Any, whole: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = whole
    moments, done = random.Random(seed), 0
    words = tiny.words(tmp_path / "run", *more("loop.resume=auto"))
    while done < kills:
        # Most of the time of a short run is its start: a kill that comes too late is another try.
        pid = runner.start(["pretrain", *words])
        time.sleep(moments.uniform(0.3, 0.9) * seconds)
        os.kill(pid, signal.SIGKILL)
        killed = runner.wait(pid) == -signal.SIGKILL
        if killed:
            done += 1
        elif (tmp_path / "run").exists():
            shutil.rmtree(tmp_path / "run")
    assert runner.run(["pretrain", *words]) == 0, runner.log.read_text()
    assert records(tmp_path / "run") == records(reference)
    assert tensors(newest(tmp_path / "run")) == tensors(newest(reference))


def test_evaluation_and_samples_leave_training_as_it_is(
    tiny: Any, runner: Any, whole: tuple[Path, float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = tiny.words(out, *more("loop.eval_every=0", "loop.sample_every=0"))
    assert runner.run(["pretrain", *words]) == 0, runner.log.read_text()
    trained = [r for r in records(whole[0]) if "loss" in r]
    assert len(trained) == STEPS and records(out) == trained
    assert tensors(newest(out)) == tensors(newest(whole[0]))
    assert any("samples" in r for r in records(whole[0]))
    assert any("bits_per_byte" in r for r in records(whole[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_with_0(
    number: signal.Signals, tiny: Any, runner: Any, whole: tuple[Path, float], tmp_path: Path
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
    assert trained == [r for r in records(whole[0]) if "loss" in r]
    assert tensors(newest(out)) == tensors(newest(whole[0]))
