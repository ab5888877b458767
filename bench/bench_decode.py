"""Suite `decode`: tokens a second of generation, beside transformers and llama.cpp, same file.

128 tokens after an empty prompt (one token), greedy, ending ignored, sampling included, text not;
then eight prompts at once, where the ratio is the throughput against one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.bench import peers
from fastllm.models.weights import open_weights
from fastllm.testing.random_model import model_path
from fastllm.testing.suite import OURS, BenchCase, Settings, Work, benchmark_case

SUITE = "decode"
SECONDS = 150
TITLE = "tokens a second of generation, end to end"
TOKENS = 128
BATCH = 8


def cases(settings: Settings) -> Iterator[BenchCase]:
    """Batch 1 in each activation mode of a quantized model, and the batch of eight."""
    modes = peers.activation_modes(model_path(settings.model), settings.device, settings.quick)
    for mode in modes:
        yield _case(f"{TOKENS} tokens, batch 1", mode, settings, _single)
    yield _case(f"{TOKENS} tokens, batch {BATCH}", modes[0], settings, _batch)


def _case(
    label: str, mode: str, settings: Settings, work: Callable[[Settings, str], Work]
) -> BenchCase:
    return BenchCase(
        suite=SUITE,
        label=label,
        dtype=mode,
        device=settings.device,
        seconds=15 if settings.quick else 40,
        min_rounds=3,
        make=lambda: work(settings, mode),
    )


def decode_params(tokens: int = TOKENS) -> SamplingParams:
    """Greedy, with so many tokens in any case, and no text."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)


def _weight_bytes(settings: Settings) -> int:
    """Bytes of weights that a token reads: all of them, the embedding only as a tied head."""
    source = open_weights(model_path(settings.model))
    names = set(source.names)
    if not source.config.tie_word_embeddings:
        names.discard("model.embed_tokens.weight")
    return sum(source.get(name).nbytes for name in names)


def _single(settings: Settings, mode: str) -> Work:
    path = model_path(settings.model)
    llm = LLM(path, activation=mode, device=settings.device, max_model_len=1024)
    start = llm.config.bos_token_id or 0
    functions: dict[str, Callable[[], Any]] = {
        OURS: lambda: llm.generate([[start]], decode_params())
    }
    notes = []
    if peers.has_transformers():
        dtype = torch.bfloat16
        if settings.device == "cpu":
            dtype = peers.faster_dtype(path, lambda m: peers.transformers_decode(m, start, 16))
        model = peers.transformers_model(path, dtype, settings.device)
        functions["transformers"] = peers.transformers_decode(model, start, TOKENS)
        notes.append(f"transformers: {dtype}, greedy generate")
    if peers.has_llama_cpp() and path.is_file() and settings.device == "cpu":
        threads = torch.get_num_threads()
        llama = peers.llama_cpp_model(path, threads)
        functions["llama.cpp"] = peers.llama_cpp_decode(llama, start, TOKENS)
        notes.append(f"llama.cpp: same file, {threads} threads, greedy")
    return Work(
        functions=functions,
        unit="tok/s",
        amount=TOKENS,
        nbytes=TOKENS * _weight_bytes(settings),
        notes=tuple(notes),
    )


def _batch(settings: Settings, mode: str) -> Work:
    """Throughput of eight prompts of unequal length; the peer is the same, one after the other."""
    llm = LLM(
        model_path(settings.model), activation=mode, device=settings.device, max_model_len=1024
    )
    start = llm.config.bos_token_id or 0
    prompts = [[start] * (1 + i) for i in range(BATCH)]

    def one_by_one() -> None:
        for prompt in prompts:
            llm.generate([prompt], decode_params())

    return Work(
        functions={OURS: lambda: llm.generate(prompts, decode_params()), "one by one": one_by_one},
        unit="tok/s",
        amount=BATCH * TOKENS,
    )


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_decode(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
