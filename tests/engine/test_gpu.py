"""The engine on a CUDA device: what the CPU gives, within rounding, batched and replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllm import LLM, SamplingParams, set_batch_invariant

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False)
FORMATS = ("f32", "bf16", "q4_0", "q4_1", "q8_0")


def _prompt(length: int) -> list[int]:
    return [(37 * i + i * i) % 400 for i in range(length)]


@pytest.mark.parametrize("format", FORMATS)
def test_logits_are_near_the_cpus(format: str, random_model: Callable[[str], Path]) -> None:
    activation = None if format in ("f32", "bf16") else "bf16"
    ids = _prompt(150)
    want = LLM(random_model(format), activation=activation).logits(ids)
    got = LLM(random_model(format), device="cuda", activation=activation).logits(ids).cpu()
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_replayed_steps_are_the_eager_ones(
    format: str, random_model: Callable[[str], Path]
) -> None:
    prompts = [_prompt(n) for n in (3, 70, 1)]
    answers = []
    for eager in (False, True):
        llm = LLM(random_model(format), device="cuda", enforce_eager=eager)
        answers.append([out.outputs[0] for out in llm.generate(prompts, GREEDY)])
    for replayed, eager_answer in zip(*answers, strict=True):
        assert replayed.token_ids == eager_answer.token_ids
        assert replayed.cumulative_logprob == eager_answer.cumulative_logprob


def test_batch_invariant_mode_keeps_parity(random_model: Callable[[str], Path]) -> None:
    set_batch_invariant(True)
    try:
        ids = _prompt(150)
        whole = LLM(random_model("bf16"), device="cuda").logits(ids)
        chunked = LLM(random_model("bf16"), device="cuda", max_num_batched_tokens=33).logits(ids)
        assert torch.equal(whole, chunked)
        llm = LLM(random_model("bf16"), device="cuda")
        prompts = [_prompt(n) for n in (5, 64, 100, 9)]
        together = llm.generate(prompts, GREEDY)
        for prompt, out in zip(prompts, together, strict=True):
            alone = llm.generate(prompt, GREEDY)[0].outputs[0]
            assert alone.cumulative_logprob == out.outputs[0].cumulative_logprob
    finally:
        set_batch_invariant(False)


def test_batch_invariant_mode_keeps_answers_through_preemption_and_shared_pages(
    random_model: Callable[[str], Path],
) -> None:
    set_batch_invariant(True)
    try:
        prompts = [_prompt(n) for n in (5, 70, 100, 64)]
        params = SamplingParams(
            n=3, max_tokens=80, seed=1, detokenize=False, repetition_penalty=1.2, ignore_eos=True
        )
        roomy = LLM(random_model("bf16"), device="cuda", max_model_len=256)
        tight = LLM(random_model("bf16"), device="cuda", max_model_len=256, num_pages=6)
        wanted = [out.outputs for out in roomy.generate(prompts, params)]
        for llm in (tight, tight, roomy):  # the second time pages are found
            for out, want in zip(llm.generate(prompts, params), wanted, strict=True):
                for got, one in zip(out.outputs, want, strict=True):
                    assert got.token_ids == one.token_ids
                    assert got.token_logprobs == one.token_logprobs
                    assert got.sampled_logprobs == one.sampled_logprobs
        assert tight._engine.scheduler.preemptions
    finally:
        set_batch_invariant(False)
