"""GRPO runs whose reward or weights fail: what is said, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grpo_runs import before_call, newest, records, result_is_that_of, train

from fastllm.errors import NumericalError, RewardError
from fastllm.train.rl.rollout import Rollouts


@pytest.mark.parametrize(("method", "result"), [("lora", "adapter"), ("full", "model")])
def test_a_reward_that_raises_names_the_sample_and_keeps_what_was_done(
    method: str, result: str, base: Callable[[str], Path], files: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    more = [f"--reward={files / 'rewards.py'}:fails", "--steps=9", "--loop.save_every=0"]
    more += ["--loop.metrics.progress=plain", "--loop.metrics.report=true", f"--method={method}"]
    with pytest.raises(RewardError, match="seven") as error:
        train(base("llama"), files, out, *more, "--prompts_per_rollout=1", "--seed=1")
    assert "no such answer" in str(error.value)
    done = [m["step"] for m in records(out)]
    assert done and newest(out).name == f"step-{done[-1]:06d}"
    assert result_is_that_of(newest(out), out / result) and (out / "report.html").exists()
    said = capsys.readouterr().err
    assert f"stopped after step {done[-1]}, saved" in said and "--resume auto" in said


def test_a_rollout_that_failed_is_in_no_line_of_a_resumed_run(
    base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = [f"--reward={files / 'rewards.py'}:fails", "--steps=9", "--loop.save_every=0"]
    more += ["--prompts_per_rollout=1", "--seed=1", "--loop.metrics.every=50"]
    with pytest.raises(RewardError, match="seven"):
        train(base("llama"), files, out, *more)
    saved = json.loads((newest(out) / "trainer.json").read_text())
    rollouts = saved["batches"]["collect"]["metrics"]["sums"]["completions/mean_length"][1]
    assert rollouts == saved["step"] > 0


def test_a_reward_that_fails_at_once_leaves_no_result(
    base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text("def never(prompts, completions, **c):\n    return []\n")
    with pytest.raises(RewardError, match="returned 0 rewards for 12 completions"):
        train(base("llama"), files, tmp_path / "run", f"--reward={tmp_path / 'rewards.py'}:never")
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("case", "weight", "problem"),
    [
        ("llama", "model.norm.weight", "logits for position"),
        ("qwen3 moe", "model.layers.0.input_layernorm.weight", "has no distribution"),
    ],
)
def test_weights_that_are_none_stop_the_rollout_and_no_checkpoint_is_lost(
    case: str, weight: str, problem: str, base: Callable[[str], Path], files: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def poison(rollouts: Rollouts) -> None:
        with torch.no_grad():
            rollouts.llm.model.get_parameter(weight).fill_(float("nan"))
        rollouts.llm.model.weights_changed()

    before_call(monkeypatch, Rollouts, "__call__", 3, poison)
    out = tmp_path / "run"
    with pytest.raises(NumericalError, match=problem):
        train(base(case), files, out, "--steps=5", "--loop.save_every=1")
    assert newest(out).name == "step-000002"
