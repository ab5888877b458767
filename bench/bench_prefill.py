"""Suite `prefill`: tokens a second of reading a prompt, beside transformers and llama.cpp.

Every call reads another random prompt, so that no cache of prefixes can answer it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.bench import peers
from fastllm.models.config import ModelConfig
from fastllm.models.weights import open_weights
from fastllm.testing.opinfo import generator
from fastllm.testing.random_model import model_path
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case

SUITE = "prefill"
SECONDS = 60
TITLE = "tokens a second of reading a prompt"
LENGTHS = (512, 128, 2048)


def cases(settings: Settings) -> Iterator[BenchCase]:
    """Prompts of 512 tokens, and in full runs shorter and longer ones and the bf16 mode."""
    modes = peers.activation_modes(model_path(settings.model), settings.device, settings.quick)
    points = [(512, modes[0])]
    if not settings.quick:
        points += [(length, modes[0]) for length in LENGTHS[1:]]
        points += [(512, mode) for mode in modes[1:]]
    for length, mode in points:
        yield BenchCase(
            suite=SUITE,
            label=f"{length} tokens",
            dtype=mode,
            device=settings.device,
            seconds=5 if settings.quick else 12,
            make=functools.partial(_work, settings, length, mode),
        )


def random_prompts(config: ModelConfig, length: int, seed: int) -> Callable[[], list[int]]:
    """A function that gives another prompt of `length` tokens at each call."""
    g = generator(seed)
    return lambda: torch.randint(0, config.vocab_size, (length,), generator=g).tolist()


def _flops(config: ModelConfig, length: int) -> float:
    """Of all products but the head, which sees one row, and of causal attention."""
    skipped = {"model.embed_tokens.weight", "lm_head.weight"}
    shapes = [
        s for name, s in config.weight_shapes().items() if name not in skipped and len(s) == 2
    ]
    width = config.num_attention_heads * config.head_dim
    attention = 2 * length * length * width * config.num_hidden_layers
    return 2.0 * length * sum(n * k for n, k in shapes) + attention


def _work(settings: Settings, length: int, mode: str) -> Work:
    path = model_path(settings.model)
    llm = LLM(  # no prompt comes twice: its pages' memory is used again, as the peers' is
        path, activation=mode, device=settings.device, max_model_len=length + 64,
        enable_prefix_caching=False,
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    ours = random_prompts(llm.config, length, 0)
    functions: dict[str, Callable[[], Any]] = {OURS: lambda: llm.generate([ours()], params)}
    notes = []
    if peers.has_transformers():
        prompts = random_prompts(llm.config, length, 1)
        make = functools.partial(peers.transformers_prefill, prompts=prompts)
        dtype = peers.faster_dtype(path, make) if settings.device == "cpu" else torch.bfloat16
        functions["transformers"] = make(peers.transformers_model(path, dtype, settings.device))
        notes.append(f"transformers: {dtype}, logits of the last row only")
    if peers.has_llama_cpp() and path.is_file() and settings.device == "cpu":
        threads = torch.get_num_threads()
        llama = peers.llama_cpp_model(path, threads, max(1024, length + 64))
        functions["llama.cpp"] = peers.llama_cpp_prefill(
            llama, random_prompts(llm.config, length, 2)
        )
        notes.append(f"llama.cpp: same file, {threads} threads, batches of 512")
    return Work(
        functions=functions,
        unit="tok/s",
        amount=length,
        nbytes=sum(open_weights(path).get(name).nbytes for name in open_weights(path).names),
        flops=_flops(llm.config, length),
        kind={"int8": "int8", "bf16": "bf16", "fp32": "f32"}[mode],
        notes=tuple(notes),
    )


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_prefill(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
