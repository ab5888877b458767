"""Suite `rollout`: tokens a second of many requests at once, as reinforcement learning makes them.

Groups of eight requests share a prompt of 128 tokens, every request gets 64 tokens, endings are
ignored, prompts and sampling are inside the time. "int8" is how inference loads read the quantized
file, beside llama.cpp's batched decoding of the same file; "bf16" are the live weights of a model
in training, beside transformers' continuous batching and its padded `generate`, without end: what
they compute for a prompt they compute once for each of its samples. Last, the cost of sharing a
prefix: the time of one prefill against that of eight samples' prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.bench import peers
from fastllm.bench.batched_peers import LlamaCppBatch, generate_batch, generate_padded
from fastllm.models.trainable import load_trainable
from fastllm.testing.opinfo import generator
from fastllm.testing.random_model import model_path
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case

SUITE = "rollout"
SECONDS = 900
TITLE = "tokens a second of 1 to 256 requests at once"
REQUESTS = (1, 8, 64, 256)
PROMPT, ANSWER, GROUP = 128, 64, 8
SHARED = 512  # tokens of the prompt whose samples share its pages


def cases(settings: Settings) -> Iterator[BenchCase]:
    """Every number of requests in both modes; quick: eight requests in int8."""
    counts = (8,) if settings.quick else REQUESTS
    for count in counts:
        yield _case(f"{count} requests", "int8", settings, functools.partial(_quantized, count))
    if settings.quick:
        return
    for count in REQUESTS:
        yield _case(f"{count} requests", "bf16", settings, functools.partial(_live, count))
    label = f"prompts of {GROUP} samples, {SHARED} tokens"
    yield _case(label, "int8", settings, _shared)


def _case(
    label: str, dtype: str, settings: Settings, make: Callable[[Settings], Work]
) -> BenchCase:
    return BenchCase(
        suite=SUITE,
        label=label,
        dtype=dtype,
        device=settings.device,
        seconds=5 if settings.quick else 30,
        min_rounds=2,
        make=functools.partial(make, settings),
    )


def prompts_of(count: int, vocab_size: int) -> list[list[int]]:
    """Random prompts, one a group."""
    groups = -(-count // GROUP)
    ids = torch.randint(10, vocab_size, (groups, PROMPT), generator=generator(5))
    return ids.tolist()


def ours(llm: LLM, count: int) -> Callable[[], Any]:
    """Our function: new draws each call, the prefix cache emptied before."""
    prompts = prompts_of(count, llm.config.vocab_size)
    params = [
        SamplingParams(
            n=min(GROUP, count - GROUP * i), max_tokens=ANSWER, ignore_eos=True, detokenize=False
        )
        for i in range(len(prompts))
    ]

    def run() -> Any:
        llm.reset_prefix_cache()
        return llm.generate(prompts, params)

    return run


def repeated(count: int, vocab_size: int) -> list[list[int]]:
    """The same requests for peers without groups."""
    return [p for p in prompts_of(count, vocab_size) for _ in range(GROUP)][:count]


def _quantized(count: int, settings: Settings) -> Work:
    path = model_path(settings.model)
    mode = peers.activation_modes(path, settings.device, True)[0]
    llm = LLM(
        path, activation=mode, device=settings.device, max_num_seqs=count,
        max_model_len=PROMPT + ANSWER,
    )  # fmt: skip
    functions = {OURS: ours(llm, count)}
    notes: list[str] = []
    if peers.has_llama_cpp() and path.is_file() and settings.device == "cpu":
        threads = torch.get_num_threads()
        llama = LlamaCppBatch(path, threads, count, PROMPT + ANSWER)
        requests = repeated(count, llm.config.vocab_size)
        functions["llama.cpp"] = lambda: llama.generate(requests, ANSWER)
        notes.append(f"llama.cpp: same file, {threads} threads, llama_decode of {count} sequences")
    return Work(functions=functions, unit="tok/s", amount=count * ANSWER, notes=tuple(notes))


def _live(count: int, settings: Settings) -> Work:
    path = model_path(settings.model)
    llm = LLM.from_model(
        load_trainable(path, torch.bfloat16, settings.device),
        max_num_seqs=count,
        max_model_len=PROMPT + ANSWER,
    )
    functions = {OURS: ours(llm, count)}
    notes: list[str] = []
    if peers.has_transformers():
        model = peers.transformers_model(path, torch.bfloat16, settings.device)
        requests = repeated(count, llm.config.vocab_size)
        functions["generate_batch"] = generate_batch(model, requests, ANSWER)
        functions["generate, padded"] = generate_padded(model, requests, ANSWER)
        notes.append("transformers: bfloat16, greedy, generate_batch and generate")
    return Work(functions=functions, unit="tok/s", amount=count * ANSWER, notes=tuple(notes))


def _shared(settings: Settings) -> Work:
    """One new token each, so that the prompt is all there is: eight samples and one."""
    llm = LLM(model_path(settings.model), device=settings.device, max_model_len=SHARED + 8)
    ids = torch.randint(10, llm.config.vocab_size, (SHARED,), generator=generator(5)).tolist()

    def run(samples: int) -> Any:
        llm.reset_prefix_cache()
        params = SamplingParams(n=samples, max_tokens=1, ignore_eos=True, detokenize=False)
        return llm.generate([ids], params)

    return Work(functions={OURS: lambda: run(GROUP), "one sample": lambda: run(1)}, unit="ms")


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_rollout(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
