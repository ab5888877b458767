"""GRPO runs that are interrupted, and resumed to the bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_runs import before_call, newest, records, tensors, train, words

from fastllm.errors import CheckpointError
from fastllm.train import grpo
from fastllm.train.rl.rollout import Rollouts

RESUMED = ["--steps=7", "--mini_batches=2", "--epochs=2", "--loop.save_every=1", "--beta=0.02"]


@pytest.fixture(scope="module")
def whole(
    base: Callable[[str], Path], files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run without interruption; 7 steps end within its second rollout."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    train(base("llama"), files, out, *RESUMED, "--loop.keep=9")
    return out


@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_a_run_resumed_within_a_rollout_has_the_bits_of_the_whole_one(
    step: int, whole: Path, base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    middle = whole / "checkpoints" / f"step-{step:06d}"
    _, metrics = train(
        base("llama"), files, tmp_path / "run", *RESUMED, f"--resume={middle}",
        # How much is decoded together and how micro batches are cut changes nothing of a rollout.
        "--max_num_seqs=5",
    )  # fmt: skip
    assert tensors(newest(tmp_path / "run")) == tensors(newest(whole))
    assert metrics == [m for m in records(whole) if m["step"] > step]


def test_lines_of_several_steps_are_the_same_after_a_resume_between_them(
    base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    more = [*RESUMED, "--loop.metrics.every=3", "--loop.keep=9", "--steps=6"]
    _, lines = train(base("llama"), files, tmp_path / "whole", *more)
    middle = tmp_path / "whole" / "checkpoints" / "step-000002"
    _, resumed = train(base("llama"), files, tmp_path / "run", *more, f"--resume={middle}")
    assert [line["step"] for line in lines] == [3, 6]
    assert resumed == lines and lines[0]["reward"] > 0


def test_a_run_killed_at_random_moments_gives_the_bits_of_the_whole_one(
    whole: Path, base: Callable[[str], Path], files: Path, runner: Any, tmp_path: Path
) -> None:
    out, moments = tmp_path / "run", random.Random(0)
    options = words(base("llama"), files, out, *RESUMED, "--resume=auto")[2:]
    argv = ["grpo", str(base("llama")), str(files / "short.jsonl"), *options]
    for step in (2, 5):
        begun = f'{{"step": {step}, "loss"'
        runner.stop_when(
            argv, out / "metrics.jsonl", lambda text, begun=begun: begun in text,
            delay=moments.uniform(0, 0.03),
        )  # fmt: skip
    assert runner.run(argv) == 0, runner.log.read_text()
    assert records(out) == records(whole)
    assert tensors(newest(out)) == tensors(newest(whole))
    assert records(out, "samples.jsonl") == records(whole, "samples.jsonl")


def test_a_signal_within_a_rollout_ends_the_run_with_what_was_done(
    whole: Path, base: Callable[[str], Path], files: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def interrupt(_: Rollouts) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before_call(monkeypatch, Rollouts, "_generate", 2, interrupt)  # of step 5
    out = tmp_path / "run"
    more = [*RESUMED, "--loop.save_every=0"]
    result, _ = train(base("llama"), files, out, *more)
    assert (result.run.status, result.run.step) == ("stopped", 4)
    assert newest(out).name == "step-000004"
    result, metrics = train(base("llama"), files, out, *more, "--resume=auto")
    assert result.run.status == "finished" and metrics == records(whole)
    assert tensors(newest(out)) == tensors(newest(whole))


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_signal_within_an_evaluation_does_not_wait_for_its_answers(
    evaluation: int, base: Callable[[str], Path], files: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    original = Rollouts.greedy
    evaluations = 0

    def interrupted(self: Rollouts, *args: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        if evaluations == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        answers = original(self, *args)
        assert evaluations < evaluation
        return answers

    monkeypatch.setattr(Rollouts, "greedy", interrupted)
    out = tmp_path / "run"
    more = ["--steps=5", "--loop.save_every=0", "--loop.eval_every=2", "--eval_prompts=4"]
    more.append("--loop.metrics.progress=plain")
    held = f"--eval_data={files / 'short.jsonl'}"
    result, _ = train(base("llama"), files, out, *more, held)
    assert (result.run.status, result.run.step) == ("stopped", 2 * (evaluation - 1))
    assert evaluation == 1 or newest(out).name == "step-000002"
    said = ["stopped before the first step, nothing was learned", "stopped after step 2, saved"]
    assert said[evaluation - 1] in capsys.readouterr().err


def test_other_data_or_another_cut_within_a_rollout_is_no_resume(
    whole: Path, base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    middle = f"--resume={whole / 'checkpoints' / 'step-000002'}"
    with pytest.raises(CheckpointError, match="the data of its prompts"):
        train(base("llama"), files, tmp_path / "a", *RESUMED, middle, data="long")
    cut = [word for word in RESUMED if "epochs" not in word]
    with pytest.raises(CheckpointError, match="cut into 2 mini_batches and 2 epochs"):
        train(base("llama"), files, tmp_path / "b", *cut, "--epochs=3", middle)


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(
    whole: Path, base: Callable[[str], Path], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(grpo, "open_given")
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(base("llama"), files, whole, *RESUMED)
