"""What tests of models share: two modules of helpers, transformers' small mixtures of experts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastllm.models.tokenizer import Tokenizer


def load_helpers(name: str) -> ModuleType:
    """A module beside this file, under its own name (test folders are not packages)."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


exported_models, moe_families = map(load_helpers, ("exported_models", "moe_families"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """transformers' random model of a family, and the directory that it was saved to."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in made:
            pytest.importorskip("transformers")
            model = moe_families.random_model(family)
            directory = tmp_path_factory.mktemp(family)
            model.save_pretrained(directory)
            made[family] = model, directory
        return made[family]

    return get


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of exported models."""
    return exported_models.small_tokenizer()


@pytest.fixture(scope="session")
def llama_cpp() -> Any:
    """The module; skips where it is not installed."""
    return pytest.importorskip("llama_cpp")
