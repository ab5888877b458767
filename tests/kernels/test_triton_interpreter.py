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

# the others import from the first, quant_moe_cases from moe_cases and quant_cases too
FILES = (
    "interpreter_cases",
    "attention_cases",
    "attention_backward_cases",
    "mla_attention_cases",
    "lm_head_cases",
    "quant_cases",
    "moe_cases",
    "quant_moe_cases",
    "moe_gate_cases",
)


def load_cases(name: str) -> ModuleType:
    """A cases' module, under its own name (test folders are not packages)."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


modules = [load_cases(name) for name in FILES]
QUICK = [name for module in modules for name in module.quick_cases()]
FULL = [name for module in modules for name in module.full_cases()]


def run_cases(*arguments: str) -> dict[str, dict[str, float | str]]:
    """Outcomes of the cases in processes that interpret kernels, one for each file."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    outcomes: dict[str, dict[str, float | str]] = {}
    for module in modules:
        command = [sys.executable, str(module.__file__), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        outcomes |= json.loads(done.stdout)
    return outcomes


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


@pytest.mark.parametrize("name", QUICK)
def test_kernel_computes_its_definition(
    name: str, quick_outcomes: dict[str, dict[str, float | str]]
) -> None:
    check(quick_outcomes[name])


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
def test_kernel_computes_its_definition_at_more_shapes(
    name: str, full_outcomes: dict[str, dict[str, float | str]]
) -> None:
    check(full_outcomes[name])
