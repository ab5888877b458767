"""What these tests share: a fixture, and the helper files beside them, made importable here.

Test folders are not packages.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers

for name in ("tiny_models", "tiny_tokenizer", "quantized_loading"):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


@pytest.fixture
def one_quiet_thread() -> None:
    """Models this small wait for a second thread longer than they compute; no progress bars."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
