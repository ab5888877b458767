"""Suite `load`: seconds to import and to load a model, and the memory that it takes.

Each number comes from a fresh process. The file is in the page cache; imports are not part of
the load time. Memory is anonymous memory above the level after `import fastllm`, so pages of the
mapped file do not count, and copies of weights do; the KV cache is set aside.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastllm.bench import peers
from fastllm.testing.random_model import model_path
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case

SUITE = "load"
SECONDS = 60
TITLE = "seconds to import and load, and memory"

_ANONYMOUS = """
import re
def anonymous():
    return 1024 * int(re.search(r"^RssAnon:\\s+(\\d+)", open("/proc/self/status").read(), re.M)[1])
"""
_IMPORT_TORCH = """
import time
start = time.perf_counter()
import torch
print(time.perf_counter() - start)
"""
_IMPORT_FASTLLM = """
import torch, time
start = time.perf_counter()
import fastllm
fastllm.LLM, fastllm.ops
print(time.perf_counter() - start)
"""
_LOAD_FASTLLM = """
import time, fastllm
LLM = fastllm.LLM
start = time.perf_counter()
llm = LLM({path!r})
llm.tokenizer
print(time.perf_counter() - start)
"""
_LOAD_LLAMA_CPP = """
import time
from llama_cpp import Llama
start = time.perf_counter()
Llama({path!r}, n_ctx=1024, verbose=False)
print(time.perf_counter() - start)
"""
_MEMORY_FASTLLM = (
    _ANONYMOUS
    + """
import fastllm
from fastllm import LLM, SamplingParams
before = anonymous()
llm = LLM({path!r}, max_model_len=128)
llm.generate([[1]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
print(anonymous() - before)
"""
)
_FILE_SIZE = """
import os
print(os.path.getsize({path!r}))
"""


def measure(program: str, path: Path) -> float:
    """What a program prints, run in a fresh interpreter."""
    command = [sys.executable, "-c", program.format(path=str(path))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cases(settings: Settings) -> Iterator[BenchCase]:
    """Imports, loading, memory."""
    if settings.device != "cpu":  # what is loaded is the same
        return
    path = model_path(settings.model)
    loaders = {OURS: _LOAD_FASTLLM}
    if peers.has_llama_cpp() and path.is_file():
        loaders["llama.cpp"] = _LOAD_LLAMA_CPP
    table: list[tuple[str, str, dict[str, str]]] = [
        ("import fastllm.LLM after torch", "s", {OURS: _IMPORT_FASTLLM, "torch": _IMPORT_TORCH}),
        ("load", "s", loaders),
    ]
    if path.is_file():
        programs = {OURS: _MEMORY_FASTLLM, "file": _FILE_SIZE}
        table.append(("anonymous memory, loaded", "MB", programs))
    for label, unit, programs in table:
        yield BenchCase(
            suite=SUITE,
            label=label,
            dtype="int8" if not label.startswith("import") else "",
            seconds=4 if settings.quick else 12,
            min_rounds=3,
            make=functools.partial(_work, programs, unit, path),
        )


def _work(programs: dict[str, str], unit: str, path: Path) -> Work:
    functions = {name: functools.partial(measure, p, path) for name, p in programs.items()}
    return Work(functions=functions, unit=unit, own_clock=True)


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_load(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
