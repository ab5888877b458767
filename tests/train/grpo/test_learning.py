"""What GRPO runs learn from rewards, what they log, and when there is nothing to learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from grpo_runs import newest, records, result_is_that_of, tensors, train, words

from fastllm.train import grpo
from fastllm.train.task import NothingToLearn


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "rejection"])
def test_every_algorithm_learns_what_is_rewarded(
    algorithm: str, base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    extra = {
        "dapo": ["--mask_truncated=false"],  # a random model hardly ever ends by itself
        "gspo": ["--mini_batches=2", "--clip_low=0.2", "--clip_high=0.2"],
        "rejection": ["--keep_from=0.3"],
        "rloo": ["--beta=0.001"],  # rewards here differ by little
    }.get(algorithm, [])
    _, metrics = train(
        base("llama"), files, tmp_path / "run", f"--algorithm={algorithm}", "--steps=30",
        "--lr=1e-2", "--group_size=8", "--prompts_per_rollout=4", *extra,
    )  # fmt: skip
    rewards = [m["reward"] for m in metrics if "reward" in m]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1, rewards
    assert {m["logprob_difference"] for m in metrics if "reward" in m} == {0.0}


def test_what_is_logged_has_the_names_that_are_known(
    base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    result, metrics = train(
        base("llama"), files, tmp_path / "run", "--steps=2", "--beta=0.1", "--eval_every=1",
        f"--eval_data={files / 'short.jsonl'}", "--eval_prompts=3", "--samples=3",
    )  # fmt: skip
    assert {
        "reward", "reward_std", "reward_stderr", "frac_reward_zero_std",
        "rewards/share/mean", "rewards/share/std",
        "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean",
        "clip_ratio/high_max", "clip_ratio/region_mean", "completions/mean_length",
        "completions/min_length", "completions/max_length", "completions/clipped_ratio",
        "logprob_difference",
    } <= set(metrics[1])  # fmt: skip
    timed = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    phases = [timed[f"seconds/{name}"] for name in ("rollout", "reward", "reference", "update")]
    assert min(phases) > 0
    assert [m["step"] for m in metrics if "eval_share" in m] == [0, 1, 2]
    assert result.before == {k: v for k, v in metrics[0].items() if k != "step"}
    assert result.after == {k: v for k, v in metrics[-1].items() if k != "step"}
    shown = records(tmp_path / "run", "samples.jsonl")
    assert [row["step"] for row in shown] == [1, 1, 1, 2, 2, 2]
    assert {"prompt", "completion", "reward", "advantage", "finish_reason"} <= set(shown[0])


def test_equal_rewards_change_nothing(
    base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    result, metrics = train(
        base("llama"), files, tmp_path / "run", f"--reward={files / 'rewards.py'}:constant",
        "--steps=2", "--beta=0", "--loop.save_every=1",
    )  # fmt: skip
    assert all(m["frac_reward_zero_std"] == 1 and m["norm"] == 0 for m in metrics)
    before = tensors(tmp_path / "run" / "checkpoints" / "step-000001")
    after = tensors(result.output)
    assert all(after[name] == before[name] for name in after)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--algorithm=dapo", "--max_completion=1", "--stop=none"], "rewards of each group"),
        (["--algorithm=grpo", "--mask_truncated=true", "--max_completion=1"], "truncated"),
        (["--algorithm=rejection", "--keep_from=2"], "no reward is 2 or more"),
    ],
)
def test_rollouts_that_leave_nothing_are_said_and_end_the_run_after_ten(
    more: list[str], why: str, base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    reward = f"--reward={files / 'rewards.py'}:constant"
    lines: list[str] = []
    config = grpo.load(None, words(base("llama"), files, tmp_path / "run", reward, *more))
    with pytest.raises(ValueError, match="10 rollouts in a row left nothing to train on") as error:
        grpo.main(config, say=lines.append)
    assert why in str(error.value)
    assert sum("leaves nothing to train on" in line for line in lines) >= 10


def test_a_run_that_finds_nothing_more_to_learn_keeps_what_was_done(
    base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    reward = f"--reward={files / 'rewards.py'}:soon_equal"
    more = [reward, "--dynamic_sampling=true", "--steps=9", "--loop.save_every=0"]
    with pytest.raises(NothingToLearn, match="the rewards of each group are equal"):
        train(base("llama"), files, out, *more)
    assert newest(out).name == "step-000002"
    assert result_is_that_of(newest(out), out / "adapter")
