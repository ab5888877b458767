"""Every Triton kernel computes its definition, at small odd shapes, under Triton's interpreter.

The interpreter must be chosen before triton is imported, so one child process runs all cases of a
run and reports; the parameters here are the names it reports by.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CASES_FILE = Path(__file__).with_name("interpreter_cases.py")


def load_cases() -> ModuleType:
    """The cases' module, under a name of its own (test folders are not packages)."""
    spec = importlib.util.spec_from_file_location("interpreter_cases", CASES_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cases = load_cases()


def run_cases(*arguments: str) -> dict[str, dict[str, float | str]]:
    """Outcomes of the cases in a process that interprets kernels."""
    command = [sys.executable, str(CASES_FILE), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def quick_outcomes() -> dict[str, dict[str, float | str]]:
    return run_cases()


@pytest.fixture(scope="session")
def full_outcomes() -> dict[str, dict[str, float | str]]:
    return run_cases("--full")


def check(outcome: dict[str, float | str]) -> None:
    """Fails with the case's exception, or with its error in units of its bound."""
    if "failure" in outcome:
        pytest.fail(str(outcome["failure"]), pytrace=False)
    assert float(outcome["excess"]) <= 1, f"error is {outcome['excess']} times its bound"


@pytest.mark.parametrize("name", cases.quick_cases())
def test_kernel_computes_its_definition(
    name: str, quick_outcomes: dict[str, dict[str, float | str]]
) -> None:
    check(quick_outcomes[name])


@pytest.mark.full
@pytest.mark.parametrize("name", cases.full_cases())
def test_kernel_computes_its_definition_at_more_shapes(
    name: str, full_outcomes: dict[str, dict[str, float | str]]
) -> None:
    check(full_outcomes[name])
