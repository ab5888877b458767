"""Suite `rl`: seconds and memory of a GRPO step beside TRL's trainer, same model and prompts.

A step samples eight completions of each of four prompts from the live weights, rewards them and
updates once. Both sides read the model in bfloat16; fastllm keeps float32 masters, TRL does not.
Most completions are as long as they may be. Each side has a process of its own; they take turns.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm.bench import peers
from fastllm.bench.scratch import Scratch
from fastllm.bench.step_process import StepProcess
from fastllm.models.loader import read_tokenizer
from fastllm.models.weights import open_weights
from fastllm.testing.random_model import model_path
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case

SUITE = "rl"
SECONDS = 900
TITLE = "seconds and memory of a GRPO step, rollout and update"
LENGTHS = ((48, 64), (48, 128), (256, 64))  # tokens of a prompt, and of a completion


def cases(settings: Settings) -> Iterator[BenchCase]:
    """Full and LoRA, short and long prompts and completions; quick: the first."""
    points = [("full", *LENGTHS[0])]
    if not settings.quick:
        points = [(method, *lengths) for method in ("full", "lora") for lengths in LENGTHS]
    for point in points:
        yield _case(settings, point, "s", ())
    if settings.device == "cpu" and not settings.quick:
        for method in ("full", "lora"):
            yield _case(settings, (method, *LENGTHS[-1]), "MB", (", memory",))


def _case(
    settings: Settings, point: tuple[str, int, int], unit: str, more: tuple[str, ...]
) -> BenchCase:
    method, prompt, answer = point
    return BenchCase(
        suite=SUITE,
        label="".join((f"{method}, prompts of {prompt}, answers of {answer}", *more)),
        dtype="bf16",
        device=settings.device,
        seconds=5 if settings.quick else 40,
        min_rounds=1 if unit == "MB" else 2,
        make=functools.partial(_work, settings, point, unit),
    )


_running: list[tuple[StepProcess, Path]] = []  # of one case at a time, with their folders


def _work(settings: Settings, point: tuple[str, int, int], unit: str) -> Work:
    _end()
    directory = dense_directory(model_path(settings.model))
    names = [OURS]
    notes = []
    if find_spec("trl") is not None and find_spec("peft") is not None:
        names.append("TRL")
        notes.append("TRL: GRPOTrainer, transformers' generate, bfloat16, SDPA")
    functions: dict[str, Callable[[], Any]] = {}
    for name in names:
        folder = _scratch().path / name
        folder.mkdir()
        process = StepProcess(
            "fastllm.bench.rl_steps", name, directory, folder, *point, settings.device
        )
        _running.append((process, folder))
        process.step()  # it is warm before the next one starts
        functions[name] = process.step if unit == "s" else process.peak
    return Work(functions=functions, unit=unit, own_clock=True, notes=tuple(notes))


def _end() -> None:
    """End the processes of the case before. They are killed, so their folders are removed here."""
    while _running:
        process, folder = _running.pop()
        process.close()
        shutil.rmtree(folder)


@functools.cache
def _scratch() -> Scratch:
    return Scratch("rl")


@functools.cache
def dense_directory(path: Path) -> str:
    """The model of `path` as a Hugging Face directory in bfloat16, with its tokenizer."""
    if path.is_dir():
        return str(path)
    folder = _scratch().path / "model"
    model = peers.transformers_model(path, torch.bfloat16)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    peers.transformers_model.cache_clear()
    read_tokenizer(open_weights(path)).save(folder)
    return str(folder)


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_rl(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
