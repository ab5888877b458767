"""pytest plugin of `transformers_tests.py`: patches, and writes down what became of every test.

FASTLLM_TESTS_MODE: "plain" leaves transformers as it is, "registered" gives its default attention
and experts to fastllm, "whole" also patches every model as it is made.
FASTLLM_TESTS_OUTCOMES: a file that gets one JSON object a test, as it ends, so that what was found
survives a crash.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest


class DistributedHooks:
    """Hooks of pytest-xdist that transformers' configuration implements; without xdist pytest
    would refuse it for that."""

    def pytest_configure_node(self, node: Any) -> None:
        """A worker starts."""

    def pytest_testnodedown(self, node: Any, error: Any) -> None:
        """A worker has ended."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare xdist's hooks where it is not installed."""
    if importlib.util.find_spec("xdist") is None:
        pluginmanager.add_hookspecs(DistributedHooks)


def pytest_configure(config: pytest.Config) -> None:
    """Patch before any test is collected."""
    mode = os.environ["FASTLLM_TESTS_MODE"]
    if mode == "plain":
        return
    from fastllm.integrations.transformers import patch

    patch(default=True)
    if mode == "whole":
        patch_every_model()


def patch_every_model() -> None:
    """Patch each model when its `__init__` is done, which transformers ends by `post_init`.

    Our kernels also serve what is so small that they would leave it to torch: all test models are.
    """
    from transformers import PreTrainedModel

    from fastllm.integrations.transformers import attention, mlp, patch

    mlp._FROM = dict.fromkeys(mlp._FROM, (0, 0))
    attention._faster_there = lambda *arguments: False
    original = PreTrainedModel.post_init

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        patch(self)

    type.__setattr__(PreTrainedModel, "post_init", post_init)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a test's outcome: of its call, or of what kept it from being called."""
    if report.when != "call" and report.passed:
        return
    row = {
        "id": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "line": "" if report.passed else last_line(report),
    }
    with Path(os.environ["FASTLLM_TESTS_OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def last_line(report: pytest.TestReport) -> str:
    """Why: the message of the exception, or of the skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())[:400]
