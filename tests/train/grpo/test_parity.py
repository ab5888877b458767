"""GRPO's log-probabilities: those of sampling are those of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpo_runs import train

from fastllm import LLM
from fastllm.train.rl.rollout import Rollouts

CASES = [
    ("llama", "full", "bfloat16", None),
    ("llama", "lora", "float32", None),
    ("qwen3 tied", "lora", "bfloat16", "nf4"),
    ("mixtral", "full", "bfloat16", None),
    ("qwen3 moe", "lora", "bfloat16", "nf4"),
]


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.full)])
@pytest.mark.parametrize(("case", "method", "dtype", "quant"), CASES)
def test_sampler_and_trainer_agree_to_the_bit_while_the_cache_preempts_and_shares(
    case: str, method: str, dtype: str, quant: str | None, steps: int,
    base: Callable[[str], Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engines: list[LLM] = []
    original = Rollouts.__call__

    def seen(self: Rollouts, *args: Any) -> Any:
        engines.append(self.llm)
        return original(self, *args)

    monkeypatch.setattr(Rollouts, "__call__", seen)
    # 12 completions of two or three pages each, eleven pages.
    _, metrics = train(
        base(case), files, tmp_path / "run", f"--method={method}", f"--dtype={dtype}",
        f"--quant={quant}", f"--steps={steps}", "--cache_pages=11", "--max_completion=60",
        "--beta=0.01", "--temperature=0.9", data="long",
    )  # fmt: skip
    assert [m["logprob_difference"] for m in metrics] == [0.0] * steps
    assert metrics[0]["kl"] == 0.0  # the reference is the policy itself, to the bit
    assert all(m["kl"] > 0 for m in metrics[1:])
    assert all(m["clip_ratio/region_mean"] == 0 for m in metrics)  # every ratio is exactly 1
    assert engines[0]._engine.scheduler.preemptions > 0


def test_several_steps_of_a_rollout_leave_the_first_policy_and_clip(
    base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    _, metrics = train(
        base("llama"), files, tmp_path / "run", "--steps=6", "--mini_batches=2", "--epochs=1",
        "--lr=2e-2",
    )  # fmt: skip
    fresh = [m for m in metrics if "reward" in m]
    assert [m["step"] for m in fresh] == [1, 3, 5]  # every second step samples anew
    assert all(m["logprob_difference"] == 0.0 for m in fresh)
    later = [m for m in metrics if "reward" not in m]
    assert not any("logprob_difference" in m for m in later)
    assert any(m["clip_ratio/region_mean"] > 0 for m in later)


def test_latent_attention_differs_by_rounding_and_says_so(
    base: Callable[[str], Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, metrics = train(
        base("deepseek v3"), files, tmp_path / "run", "--steps=2", "--dtype=float32",
        "--loop.metrics.progress=plain",
    )  # fmt: skip
    assert all(m["logprob_difference"] < 1e-3 for m in metrics)
    assert "of the size of rounding, not 0" in capsys.readouterr().err
