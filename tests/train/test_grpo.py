"""GRPO runs: parity, learning, resumes, refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllm import LLM
from fastllm.cli.main import main as fastllm_main
from fastllm.errors import CheckpointError, DataError, NumericalError, RewardError
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.testing.quantized_models import directory
from fastllm.train import grpo
from fastllm.train.data.masks import turn_ends
from fastllm.train.rl import setup
from fastllm.train.rl.policy_task import PolicyTask
from fastllm.train.rl.rollout import Rollouts
from fastllm.train.rl.setup import RlResult
from fastllm.train.task import NothingToLearn

WORDS = "one two three four five six seven eight nine ten".split()
# 70 tokens at least that all prompts begin with: more than a page, shared in the cache.
PREFIX = " ".join(WORDS[i % 10] for i in range(80)) + " "
QUIET = ["--loop.metrics.progress=none", "--loop.metrics.report=false"]
SMALL = [
    "--chat_template=plain", "--group_size=4", "--prompts_per_rollout=3", "--max_completion=12",
    "--eval_prompts=0", "--lr=3e-3", "--warmup=0",
]  # fmt: skip
REWARDS = """
def share(prompts, completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]

def fails(prompts, completions, answer, **columns):
    if "seven" in answer:
        raise KeyError("no such answer")
    return [float(len(text)) for text in completions]

calls = 0

def soon_equal(prompts, completions, **columns):
    global calls
    calls += 1
    return [float(i if calls <= 2 else 1) for i in range(len(completions))]

def constant(prompts, completions, **columns):
    return [0.25] * len(completions)
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    rows = [{"prompt": word, "answer": word} for word in WORDS]
    (folder / "short.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"prompt": PREFIX + word, "answer": word} for word in WORDS]
    (folder / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def base(files: Path) -> Callable[[str], Path]:
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2, 290, allow_smaller=True)

    def model(case: str) -> Path:
        path = files / case.replace(" ", "-")
        if not path.exists():
            directory(
                case, path, tokenizer, vocab_size=tokenizer.vocab_size,
                eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
            )  # fmt: skip
        return path

    return model


def words(model: Path, files: Path, out: Path, *more: str, data: str = "short") -> list[str]:
    given = {word.partition("=")[0] for word in more}
    reward = [] if "--reward" in given else [f"--reward={files / 'rewards.py'}:share"]
    small = [word for word in SMALL if word.partition("=")[0] not in given]
    return [
        f"--model={model}", f"--data={files / data}.jsonl", f"--out={out}", *reward, *QUIET,
        *small, *more,
    ]  # fmt: skip


def train(*args: Any, **kwargs: Any) -> tuple[RlResult, list[dict[str, Any]]]:
    """(result, metrics) of a run in this process."""
    config = grpo.load(None, words(*args, **kwargs))
    result = grpo.main(config, say=lambda line: None)
    return result, records(Path(config.loop.out))


def records(out: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a file without what time decides."""
    timed = ("seconds", "tokens_per_second", "mfu")
    lines = map(json.loads, (out / file).read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor below a folder."""
    found = {k: v for f in sorted(folder.rglob("*.safetensors")) for k, v in load_file(f).items()}
    assert found
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in found.items()}


def newest(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step-*"))[-1]


# parity

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


# learning


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


# interruptions

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
        pid = runner.start(argv)
        file = out / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (file.exists() and f'{{"step": {step}, "loss"' in file.read_text()):
            assert time.monotonic() < deadline, runner.log.read_text()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        runner.wait(pid)
    assert runner.run(argv) == 0, runner.log.read_text()
    assert records(out) == records(whole)
    assert tensors(newest(out)) == tensors(newest(whole))
    assert records(out, "samples.jsonl") == records(whole, "samples.jsonl")


def test_a_signal_within_a_rollout_ends_the_run_with_what_was_done(
    whole: Path, base: Callable[[str], Path], files: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    original = Rollouts._generate
    rollouts = 0

    def interrupted(self: Rollouts, *args: Any) -> Any:
        nonlocal rollouts
        rollouts += 1
        if rollouts == 2:  # of step 5
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(Rollouts, "_generate", interrupted)
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


# failures


def result_is_that_of(checkpoint: Path, result: Path) -> bool:
    """Whether the model's tensors in a run's result are those of a checkpoint."""
    before = tensors(checkpoint)
    return all(before[name] == value for name, value in tensors(result).items())


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


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(
    whole: Path, base: Callable[[str], Path], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(grpo, "open_given")
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(base("llama"), files, whole, *RESUMED)


def test_the_reference_of_full_training_is_there_before_the_cache_is_sized(
    base: Callable[[str], Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, found = PolicyTask.serve, []

    def seen(self: PolicyTask, **options: Any) -> LLM:
        found.append(self._reference)
        return serve(self, **options)

    monkeypatch.setattr(PolicyTask, "serve", seen)
    for method, beta in (("full", 0.1), ("full", 0), ("lora", 0.1)):
        out = tmp_path / f"{method}-{beta}"
        train(base("llama"), files, out, f"--method={method}", f"--beta={beta}", "--steps=1")
    assert [reference is not None for reference in found] == [True, False, False]


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
    original = Rollouts.__call__
    rollouts = 0

    def poisoned(self: Rollouts, *args: Any) -> Any:
        nonlocal rollouts
        rollouts += 1
        if rollouts == 3:
            with torch.no_grad():
                self.llm.model.get_parameter(weight).fill_(float("nan"))
            self.llm.model.weights_changed()
        return original(self, *args)

    monkeypatch.setattr(Rollouts, "__call__", poisoned)
    out = tmp_path / "run"
    with pytest.raises(NumericalError, match=problem):
        train(base(case), files, out, "--steps=5", "--loop.save_every=1")
    assert newest(out).name == "step-000002"


def test_latent_attention_differs_by_rounding_and_says_so(
    base: Callable[[str], Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, metrics = train(
        base("deepseek v3"), files, tmp_path / "run", "--steps=2", "--dtype=float32",
        "--loop.metrics.progress=plain",
    )  # fmt: skip
    assert all(m["logprob_difference"] < 1e-3 for m in metrics)
    assert "of the size of rounding, not 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("--top_p=0.9", "top_p must not cut the distribution"),
        ("--top_k=20", "top_k must not cut the distribution"),
        ("--temperature=0", "temperature must be above 0"),
        ("--group_size=1", "group_size must be at least 2"),
        ("--group_size=129", "group_size must be from 1 to 128"),
        ("--lora.dropout=0.1", "lora.dropout must be 0"),
        ("--reward_weights=1,2", "reward_weights has 2 numbers for 1"),
        ("--reward_weights=inf", "reward_weights must be finite"),
        ("--mini_batches=99", "mini_batches is 99"),
        ("--algorithm=dappo", "did you mean dapo"),
        ("--kl=k1", "kl k1 has no gradient"),
        ("--max_completion=0", "max_completion must be above 0"),
    ],
)
def test_configurations_that_cannot_be_are_refused(word: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        grpo.load(None, ["--model=x", "--data=y", word])


def test_reward_models_are_where_the_policy_is(
    base: Callable[[str], Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(names: Any, device: str | None = None) -> Any:
        raise LookupError(device)

    monkeypatch.setattr(setup, "resolve_rewards", found)
    with pytest.raises(LookupError, match="cpu"):
        train(base("llama"), files, tmp_path / "run")


def test_what_ends_an_answer_by_the_template_ends_completions(
    base: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    model = tmp_path / "base"
    shutil.copytree(base("llama"), model)
    config = json.loads((model / "config.json").read_text())
    text = Tokenizer.from_hf(model).eos_token_id
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": text}))
    (model / "generation_config.json").unlink(missing_ok=True)
    turn = Tokenizer.from_hf(model).token_to_id("<|im_end|>")
    for template, ends in (("model", {text, turn}), ("plain", {text})):
        given = words(model, files, tmp_path / "run", f"--chat_template={template}")
        found = setup.open_given(grpo.load(None, given), torch.device("cpu"))
        assert set(found.end_ids) == ends
    broken = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert turn_ends(Tokenizer.from_hf(model), broken) == frozenset()


def test_rejection_takes_groups_of_one() -> None:
    words = ["--model=x", "--data=y", "--algorithm=rejection", "--group_size=1"]
    assert grpo.load(None, words).group_size == 1


def test_what_cannot_be_asked_is_named_at_the_start(
    base: Callable[[str], Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base("llama")
    with pytest.raises(DataError, match=r"long\.jsonl: line 1: the prompt has"):
        train(model, files, tmp_path / "a", "--max_completion=200", data="long")
    with pytest.raises(ValueError, match="fills the model's context"):
        train(model, files, tmp_path / "b", "--max_completion=256")
    with pytest.raises(ValueError, match="data is empty"):
        grpo.main(grpo.load(None, [f"--model={model}"]))
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no records"):
        empty = [f"--data={tmp_path / 'none.jsonl'}", "--max_completion=9"]
        grpo.main(grpo.load(None, [f"--model={model}", *empty]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        train(model, files, tmp_path / "c")


def test_the_command_trains_and_its_help_lists_every_key(
    base: Callable[[str], Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["grpo", str(base("llama")), str(files / "short.jsonl"), "--steps=1", "--eval_prompts=0"]
    reward = f"--reward={files / 'rewards.py'}:share"
    assert fastllm_main([*argv, reward, f"--out={tmp_path / 'run'}", *QUIET, *SMALL[:4]]) == 0
    assert "finished after 1 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert fastllm_main(["grpo", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{key}" in said for key in ("algorithm", "beta", "group_size", "rewards"))
    assert fastllm_main([*argv, "--reward=acuracy"]) == 2
    assert "did you mean accuracy" in capsys.readouterr().err
