"""Small runs of GRPO: their settings, their rewards, and what they leave on disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllm.train import grpo
from fastllm.train.rl.setup import RlResult

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


def before_call(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, number: int,
    act: Callable[[Any], None],
) -> None:  # fmt: skip
    """Run `act(self)` before one call of a method: the first is number 1."""
    original, calls = getattr(owner, name), itertools.count(1)

    def called(self: Any, *args: Any) -> Any:
        if next(calls) == number:
            act(self)
        return original(self, *args)

    monkeypatch.setattr(owner, name, called)


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


def result_is_that_of(checkpoint: Path, result: Path) -> bool:
    """Whether the model's tensors in a run's result are those of a checkpoint."""
    before = tensors(checkpoint)
    return all(before[name] == value for name, value in tensors(result).items())
