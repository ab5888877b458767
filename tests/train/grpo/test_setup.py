"""What GRPO runs are given: configurations, prompts, rewards, templates; the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_runs import QUIET, SMALL, train, words

from fastllm import LLM
from fastllm.cli.main import main as fastllm_main
from fastllm.errors import DataError
from fastllm.models.tokenizer import Tokenizer
from fastllm.train import grpo
from fastllm.train.data.masks import turn_ends
from fastllm.train.rl import setup
from fastllm.train.rl.policy_task import PolicyTask


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
