"""Suites rollout and rl: everybody is asked the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastllm.bench import bench_rl, bench_rollout, rl_steps, scratch
from fastllm.bench.step_process import StepProcess
from fastllm.testing.suite import Settings


@pytest.mark.parametrize("count", [1, 8, 20])
def test_peers_without_groups_get_the_same_requests(count: int) -> None:
    groups = bench_rollout.prompts_of(count, 1000)
    requests = bench_rollout.repeated(count, 1000)
    assert len(requests) == count and len(groups) == -(-count // bench_rollout.GROUP)
    assert all(request in groups for request in requests)
    assert all(len(prompt) == bench_rollout.PROMPT for prompt in groups)


def test_questions_differ_and_grow_with_the_prompt() -> None:
    short, long = rl_steps.questions(48), rl_steps.questions(256)
    assert len(set(short)) == len(short) == len(long)
    assert len(long[0].split()) > 4 * len(short[0].split())


def test_both_forms_of_a_completion_earn_their_length() -> None:
    chat = [[{"role": "assistant", "content": "four"}]]
    assert rl_steps.text_length([""], ["four"]) == rl_steps.text_length([""], chat) == [4.0]


def test_full_runs_measure_every_point_and_the_memory_of_both_methods() -> None:
    labels = [case.label for case in bench_rl.cases(Settings())]
    assert len(set(labels)) == len(labels) == 8
    assert sum(label.endswith(", memory") for label in labels) == 2
    assert len(list(bench_rollout.cases(Settings()))) == 9


def test_a_killed_process_leaves_no_folder_beyond_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "from fastllm.bench.scratch import Scratch; "
        "kept = Scratch('t'); print(kept.path, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as other:  # fmt: skip
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "weights").write_text("large")
        monkeypatch.setattr(scratch, "_YOUNG", -1.0)
        (tmp_path / "fastllm-t-foreign").mkdir()
        mine = scratch.Scratch("t")
        assert theirs.exists() and mine.path != theirs  # its process is running
        other.kill()
        other.wait()
    again = scratch.Scratch("t")
    assert not theirs.exists() and mine.path.exists() and again.path.exists()
    mine.close()
    again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["fastllm-t-foreign"]


def test_a_process_takes_steps_when_asked_and_says_when_it_cannot() -> None:
    clock = (
        "from fastllm.bench.step_process import StepClock, serve_steps; "
        "serve_steps(lambda: None, StepClock('cpu'))"
    )
    process = StepProcess.__new__(StepProcess)
    process.start([sys.executable, "-c", clock])
    assert process.step() < 1 and process.peak() > 0
    process.close()
    process.start([sys.executable, "-c", "input(); raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="ended with 3"):
        process.step()
    process.close()
