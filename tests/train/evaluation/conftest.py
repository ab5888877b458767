"""A small model with a tokenizer, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm.testing.evaluation import save_small_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("evaluation") / "model")
