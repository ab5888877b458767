"""Long cases are deselected unless asked for, and every test restores ISA level and threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastllm import _C


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
