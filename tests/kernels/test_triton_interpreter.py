"""Every Triton kernel computes its definition, at small odd shapes, under Triton's interpreter.

The interpreter must be chosen before triton is imported, so child processes run the selected cases
and report; the parameters here are the names they report by.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from fastllm.testing.machine import usable_cores

# Cases of each file in the plain run, 158 in all. The others import from the first, those of packed
# weights from quant_cases and moe_cases too.
FILES = {
    "interpreter_cases": 36,
    "attention_cases": 22,
    "attention_backward_cases": 8,
    "mla_attention_cases": 9,
    "lm_head_cases": 14,
    "quant_cases": 32,
    "quantize_cases": 8,
    "moe_cases": 11,
    "quant_moe_cases": 8,
    "moe_gate_cases": 10,
}


def load_cases(name: str) -> ModuleType:
    """A cases' module, under its own name (test folders are not packages)."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CASES_AT_ONCE = 40  # of a process: imports cost seconds, and one long list leaves cores idle

modules = [load_cases(name) for name in FILES]


def covering(names: list[str], count: int) -> list[str]:
    """A seeded choice of so many cases, every kernel (the first word of a name) in turn."""
    shuffled = random.Random(0).sample(names, len(names))
    kernels = dict.fromkeys(name.split()[0] for name in names)
    groups = [[name for name in shuffled if name.split()[0] == kernel] for kernel in kernels]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    return list(filter(None, turns))[:count]


QUICK = {m.__name__: covering(list(m.quick_cases()), FILES[m.__name__]) for m in modules}
FULL = {
    m.__name__: [name for name in m.quick_cases() | m.full_cases() if name not in QUICK[m.__name__]]
    for m in modules
}


def run_cases(file: str, names: list[str]) -> dict[str, dict[str, float | str]]:
    """Outcomes of one file's cases, in a process that interprets kernels."""
    done = subprocess.run(
        [sys.executable, file, "--names"],
        input=json.dumps(names),
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes: dict[str, dict[str, float | str]] = json.loads(done.stdout)
    return outcomes


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> dict[str, dict[str, float | str]]:
    """Of the cases that this run selected; a process for each core."""
    selected = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "outcomes" in item.fixturenames
    }
    jobs = []
    for module in modules:
        cases = QUICK[module.__name__] + FULL[module.__name__]
        names = [name for name in cases if name in selected]
        count = -(-len(names) // CASES_AT_ONCE)  # neighbours cost the same: dealt out in turn
        jobs += [(str(module.__file__), names[i::count]) for i in range(count)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        done = pool.map(run_cases, *zip(*jobs, strict=True))
        return dict(itertools.chain.from_iterable(found.items() for found in done))


def check(outcome: dict[str, float | str]) -> None:
    """Fails with the case's exception, or with its error in units of its bound."""
    if "failure" in outcome:
        pytest.fail(str(outcome["failure"]), pytrace=False)
    assert float(outcome["excess"]) <= 1, f"error is {outcome['excess']} times its bound"


@pytest.mark.parametrize("name", itertools.chain.from_iterable(QUICK.values()))
def test_kernel_computes_its_definition(
    name: str, outcomes: dict[str, dict[str, float | str]]
) -> None:
    check(outcomes[name])


@pytest.mark.full
@pytest.mark.parametrize("name", itertools.chain.from_iterable(FULL.values()))
def test_kernel_computes_its_definition_at_more_shapes(
    name: str, outcomes: dict[str, dict[str, float | str]]
) -> None:
    check(outcomes[name])
