"""A token's log-probabilities have the same bits however the work is cut, batched or run.

Whole prompts, chunks, single tokens, decode steps eager and replayed, 1 and 2 threads, alone and in
a batch of eight, at every ISA level of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm import _C, LLM, SamplingParams
from fastllm.ops.log_probs import log_probs

MODELS = [("f32", {}), ("f32", {"dtype": "float32"}), ("bf16", {})] + [
    (format, options)
    for format in ("q4_0", "q4_1", "q8_0")
    for options in ({}, {"activation": "bf16"}, {"activation": "fp32"})
]
LENGTH = 150  # three pages
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False, logprobs=0)

model_cases = pytest.mark.parametrize(
    ("format", "options"),
    MODELS,
    ids=[f"{format}-{'-'.join(options.values()) or 'default'}" for format, options in MODELS],
)


def _prompt(length: int = LENGTH) -> list[int]:
    return [(37 * i + i * i) % 400 for i in range(length)]


def _logprobs_of(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Raw log-probabilities of ids[1:], each under the logits of the token before."""
    return log_probs(logits[:-1], torch.tensor(ids[1:]).unsqueeze(1))[:, 0]


def _chosen(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    outs = [out.outputs[0] for out in llm.generate(prompts, GREEDY)]
    return [
        (o.token_ids, [e[t].logprob for t, e in zip(o.token_ids, o.logprobs, strict=True)])
        for o in outs
    ]


@model_cases
def test_prefill_has_the_same_bits_whole_and_in_chunks(
    format: str, options: dict[str, Any], random_model: Callable[[str], Path]
) -> None:
    ids = _prompt()
    whole = LLM(random_model(format), **options).logits(ids)
    assert torch.isfinite(whole).all()
    for chunk in (1, 7, 64, 100):
        llm = LLM(random_model(format), max_num_batched_tokens=chunk, **options)
        assert torch.equal(llm.logits(ids), whole), f"chunks of {chunk}"


@model_cases
def test_decoding_has_the_bits_of_prefill(
    format: str, options: dict[str, Any], random_model: Callable[[str], Path]
) -> None:
    prompt = _prompt(60)  # the answer crosses into the second page
    llm = LLM(random_model(format), **options)
    ids, logprobs = _chosen(llm, [prompt])[0]
    everything = prompt + ids
    forced = _logprobs_of(llm.logits(everything), everything)[len(prompt) - 1 :]
    assert logprobs == forced.tolist()
    eager = LLM(random_model(format), enforce_eager=True, **options)
    assert _chosen(eager, [prompt]) == [(ids, logprobs)]


@model_cases
def test_a_batch_of_eight_has_the_bits_of_each_alone(
    format: str, options: dict[str, Any], random_model: Callable[[str], Path]
) -> None:
    llm = LLM(random_model(format), max_num_batched_tokens=90, **options)
    prompts = [_prompt(n)[::-1] for n in (3, 150, 64, 1, 65, 20, 99, 2)]
    together = _chosen(llm, prompts)
    assert together == [_chosen(llm, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize(("format", "options"), [("f32", {"dtype": "float32"}), ("q4_1", {})])
def test_threads_do_not_change_a_bit(
    format: str, options: dict[str, Any], random_model: Callable[[str], Path]
) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        llm = LLM(random_model(format), **options)
        results.append((llm.logits(_prompt()), _chosen(llm, [_prompt(9), _prompt(70)])))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_every_isa_level_keeps_parity(random_model: Callable[[str], Path]) -> None:
    prompt = _prompt(70)
    for isa in _C.isas():
        _C.set_isa(isa)
        for format in ("q4_1", "bf16"):
            llm = LLM(random_model(format))
            ids, logprobs = _chosen(llm, [prompt])[0]
            everything = prompt + ids
            forced = _logprobs_of(llm.logits(everything), everything)[len(prompt) - 1 :]
            assert logprobs == forced.tolist(), isa


def test_prompt_logprobs_are_those_of_the_logits(random_model: Callable[[str], Path]) -> None:
    llm = LLM(random_model("q8_0"), max_num_batched_tokens=70)
    prompt = _prompt()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    reported = llm.generate(prompt, params)[0].prompt_logprobs[1:]
    got = [entries[token].logprob for token, entries in zip(prompt[1:], reported, strict=True)]
    assert got == _logprobs_of(llm.logits(prompt), prompt).tolist()


class _Count(TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_decoded_token_costs_no_torch_dispatch(
    prompts: int, random_model: Callable[[str], Path]
) -> None:
    llm = LLM(random_model("q4_1"))
    params = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, detokenize=False)
    stream = llm.generate([_prompt(4 + n) for n in range(prompts)], params, stream=True)
    next(stream)  # the prompts, and the first step's capture
    with _Count() as count:
        tokens = sum(1 for item in stream for _ in item.outputs)
    assert tokens >= 19
    assert count.seen == []


def test_a_captured_step_is_native_throughout(random_model: Callable[[str], Path]) -> None:
    llm = LLM(random_model("q4_1"))
    llm.generate(_prompt(5), GREEDY)
    (step,) = llm._engine.runner._steps.values()
    names = step._run.__self__.names()
    assert names.count("paged_attention") == llm.config.num_hidden_layers
    assert names[-1] == "sampling"
