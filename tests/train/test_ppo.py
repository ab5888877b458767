"""PPO runs: a reward rises, the sampler has the trainer's bits, a killed run goes on exactly."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllm.cli import ppo as cli
from fastllm.errors import CheckpointError
from fastllm.models.loader import save_pretrained
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize
from fastllm.testing.small_models import config_of
from fastllm.train import ppo, reward
from fastllm.train.metrics import read
from fastllm.train.rl.setup import RlResult

QUIET = ["--loop.metrics.progress=none", "--loop.metrics.report=false", "--eval_prompts=0"]
SMALL = ["--prompts_per_rollout=8", "--max_completion=6", "--chat_template=plain"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two layers, dense and with experts, prompts, and a reward: the share of ASCII."""
    folder = tmp_path_factory.mktemp("ppo")
    tokenizer = train_tokenizer(["one two three four 1 2 3"] * 4, 300, allow_smaller=True)
    for name, case in (("dense", "qwen3 tied"), ("experts", "mixtral")):
        save_model(folder / name, case, tokenizer)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(40))
    )
    (folder / "rewards.py").write_text(
        "def ascii_share(prompts, completions, **columns):\n"
        "    return [sum(c.isascii() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    return folder


def save_model(path: Path, case: str, tokenizer: Tokenizer) -> None:
    config = replace(
        config_of(case),
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
    )
    save_pretrained(initialize(config, dtype=torch.float32, seed=1), path, tokenizer)


def learn(folder: Path, out: Path, *more: str, model: str = "dense") -> RlResult:
    words = [
        f"--model={folder / model}", f"--data={folder / 'prompts.jsonl'}", f"--out={out}",
        f"--rewards={folder / 'rewards.py'}:ascii_share", *QUIET, *SMALL,
    ]  # fmt: skip
    return ppo.main(ppo.load(None, [*words, *more]), say=lambda line: None)


def records(out: Path) -> list[dict[str, Any]]:
    return read(out / "metrics.jsonl")


@pytest.mark.parametrize(
    ("method", "rate", "gain"), [("full", "1e-2", 0.2), ("lora", "3e-2", 0.08)]
)
def test_a_trivial_reward_rises_and_rollouts_have_the_bits_of_training(
    folder: Path, tmp_path: Path, method: str, rate: str, gain: float
) -> None:
    learn(
        folder, tmp_path / "run", f"--method={method}", f"--lr={rate}", "--steps=24",
        f"--critic_lr={rate}", "--prompts_per_rollout=32", "--epochs=1", "--mini_batches=1",
        "--loop.save_every=0",
    )  # fmt: skip
    lines = records(tmp_path / "run")
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + gain
    assert {line["logprob_difference"] for line in lines} == {0.0}
    assert {line["value_difference"] for line in lines} == {0.0}
    assert lines[0]["objective/kl"] == 0 and lines[-1]["objective/kl"] > 0
    assert lines[0]["val/mean"] == 0  # a critic begins with no opinion
    assert lines[-1]["val/error"] < 0.1
    names = (
        "objective/rlhf_reward", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio",
        "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/num_eos_tokens",
    )  # fmt: skip
    assert all(name in lines[-1] for name in names) and lines[-1]["episode"] == 24 * 32


@pytest.mark.parametrize("more", [["--quant=q8_0"], []])
def test_sampler_and_trainer_agree_on_experts_and_on_quantized_bases(
    folder: Path, tmp_path: Path, more: list[str]
) -> None:
    # rows of 48 columns do not fit q8_0's blocks of 32: layers that fit are quantized
    model = "dense" if more else "experts"
    options = ["--steps=4", "--lr=1e-2", "--mini_batches=1", "--epochs=2", *more]
    learn(folder, tmp_path / "run", *options, model=model)
    lines = records(tmp_path / "run")
    found = [line["logprob_difference"] for line in lines if "logprob_difference" in line]
    assert found == [0.0, 0.0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_goes_on_from_within_a_rollout_ends_with_the_same_bits(
    folder: Path, tmp_path: Path, method: str
) -> None:
    options = [
        f"--method={method}", "--steps=6", "--loop.save_every=1", "--loop.keep=9", "--lr=1e-2",
        "--mini_batches=2", "--epochs=2", "--kl_target=0.5", "--kl_horizon=50",
    ]  # fmt: skip
    whole = learn(folder, tmp_path / "whole", *options)
    for step in (3, 4):  # within the first rollout, and at its end
        middle = tmp_path / "whole" / "checkpoints" / f"step-00000{step}"
        again = learn(folder, tmp_path / f"again{step}", *options, f"--resume={middle}")
        for file in whole.output.glob("*.safetensors"):
            ours, theirs = load_file(file), load_file(again.output / file.name)
            assert ours.keys() == theirs.keys() and ours
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        last, other = records(tmp_path / "whole")[-1], records(tmp_path / f"again{step}")[-1]
        for name in ("loss/value_avg", "objective/kl_coef", "episode", "val/mean"):
            assert last.get(name) == other.get(name)
    assert records(tmp_path / "whole")[4]["objective/kl_coef"] != 0.05


def test_a_run_killed_with_9_gives_the_bits_of_the_whole_one(
    folder: Path, tmp_path: Path, runner: Any
) -> None:
    def argv(out: Path) -> list[str]:
        return [
            "ppo", str(folder / "dense"), str(folder / "prompts.jsonl"), f"--out={out}",
            f"--rewards={folder / 'rewards.py'}:ascii_share", *QUIET, *SMALL, "--steps=8",
            "--lr=1e-2", "--mini_batches=2", "--epochs=2", "--loop.save_every=1", "--resume=auto",
        ]  # fmt: skip

    assert runner.run(argv(tmp_path / "whole")) == 0, runner.log.read_text()
    out, moments = tmp_path / "run", random.Random(0)
    for step in (2, 5):  # within rollouts of four steps
        begun = f'{{"step": {step}, "loss"'
        runner.stop_when(
            argv(out), out / "metrics.jsonl", lambda text, begun=begun: begun in text,
            delay=moments.uniform(0, 0.03),
        )  # fmt: skip
    assert runner.run(argv(out)) == 0, runner.log.read_text()
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert untimed(out) == untimed(tmp_path / "whole")


def untimed(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics without what a clock says."""
    clocks = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in records(out)]


def test_another_critic_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    learn(folder, tmp_path / "run", "--steps=1")
    with pytest.raises(CheckpointError, match="adapter"):
        learn(folder, tmp_path / "run", "--steps=2", "--resume=auto", "--rank=4")


def test_what_was_cut_pays_the_missing_end(folder: Path, tmp_path: Path) -> None:
    learn(folder, tmp_path / "run", "--steps=1", "--missing_eos_penalty=3", "--samples=8")
    (line,) = records(tmp_path / "run")
    cut = line["completions/clipped_ratio"]
    assert cut > 0
    assert line["objective/scores"] == pytest.approx(line["reward"] - 3 * cut)


def test_a_reward_model_rewards_and_starts_the_critic(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rankings.jsonl"
    records_ = [
        {"prompt": f"say {i}", "answers": ["one two", "3 3"], "ranks": [1, 2]} for i in range(8)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records_))
    words = [f"--model={folder / 'dense'}", f"--data={data}", f"--out={tmp_path / 'judge'}",
             "--holdout=none", "--steps=2", "--lr=1e-2", *QUIET[:2]]  # fmt: skip
    judge = reward.main(reward.load(None, words), say=lambda line: None).output
    learn(
        folder, tmp_path / "run", f"--rewards=model:{judge}", f"--critic={judge}", "--steps=2",
        "--mini_batches=1", "--epochs=1",
    )  # fmt: skip
    first = records(tmp_path / "run")[0]
    assert first["rewards/model/std"] > 0 and first["val/mean"] != 0


def test_the_command_trains(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "dense"), "arithmetic:1", "--reward=exact_match", *SMALL, *QUIET[:2]]
    more = [f"--out={tmp_path / 'run'}", "--steps=1", "--eval_prompts=4", "--task_count=20"]
    assert cli.run([*words, *more]) == 0
    shown = capsys.readouterr().out
    assert "on held-out prompts" in shown and "finished after 1 steps" in shown


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": 1.5}, "gamma must be from 0 to 1"),
        ({"kl_coef": -1.0}, "kl_coef must be a number from 0"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_coef 0 cannot be adapted"),
        ({"kl_target": 6.0, "kl_horizon": 12.8}, "kl_horizon must be above 12.8"),
        ({"cliprange_value": 0.0}, "cliprange_value must be above 0"),
        ({"critic_lr": -1.0}, "critic_lr must be above 0"),
    ],
)
def test_wrong_values_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo.PpoConfig(**values)  # type: ignore[arg-type]


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        ppo.main(ppo.PpoConfig(data=("arithmetic:1",)))
