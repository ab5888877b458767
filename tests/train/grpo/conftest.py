"""What tests of GRPO share: prompts, rewards and small models on disk, a module of helpers."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.testing.quantized_models import directory

# Test folders are not packages.
spec = importlib.util.spec_from_file_location("grpo_runs", Path(__file__).with_name("grpo_runs.py"))
assert spec is not None and spec.loader is not None
grpo_runs = importlib.util.module_from_spec(spec)
sys.modules["grpo_runs"] = grpo_runs
spec.loader.exec_module(grpo_runs)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    rows = [{"prompt": word, "answer": word} for word in grpo_runs.WORDS]
    (folder / "short.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"prompt": grpo_runs.PREFIX + word, "answer": word} for word in grpo_runs.WORDS]
    (folder / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "rewards.py").write_text(grpo_runs.REWARDS)
    return folder


@pytest.fixture(scope="session")
def base(files: Path) -> Callable[[str], Path]:
    tokenizer = train_tokenizer([" ".join(grpo_runs.WORDS)] * 2, 290, allow_smaller=True)

    def model(case: str) -> Path:
        path = files / case.replace(" ", "-")
        if not path.exists():
            directory(
                case, path, tokenizer, vocab_size=tokenizer.vocab_size,
                eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
            )  # fmt: skip
        return path

    return model
