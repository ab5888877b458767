"""A small tokenizer for the tests of data, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm.models.tokenizer_training import save_tokenizer, train_tokenizer

TEXTS = [f"The {n} cats sat on the mat, and {n} dogs ran in the fog.\n" for n in range(30)]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, 290), path)
    return path
