"""Mixtures of experts generate: transformers' answers, training's log-probabilities, equal bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import FAMILIES, PROMPT, chosen, families, some

from fastllm import LLM, SamplingParams
from fastllm.ops.log_probs import log_probs
from fastllm.testing.small_models import batch_of, model_of, random_documents
from fastllm.train.optim import AdamW


@families
def test_greedy_answers_are_those_of_transformers(
    family: str, models: Callable[[str], tuple[Any, Path]]
) -> None:
    theirs, directory = models(family)
    prompts = [PROMPT[:n] for n in (5, 33, 40)]
    llm = LLM(directory, dtype="float32", max_num_batched_tokens=24)
    greedy = SamplingParams(temperature=0.0, max_tokens=16, detokenize=False, ignore_eos=True)
    answers = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy)]
    for ids, answer in zip(prompts, answers, strict=True):
        given = torch.tensor([ids])
        want = theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=16, do_sample=False
        )
        assert answer == want[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("family", "dtype"),
    some(
        [("qwen3_moe", "float32"), ("olmoe", "bfloat16"), ("deepseek_v3", "bfloat16")],
        *((family, "float32") for family in FAMILIES if family != "qwen3_moe"),
        *((family, "bfloat16") for family in ("mixtral", "qwen3_moe", "deepseek_v2")),
    ),
)
def test_bits_do_not_depend_on_graphs_batches_or_chunks(
    family: str, dtype: str, models: Callable[[str], tuple[Any, Path]]
) -> None:
    _, directory = models(family)
    prompts = [PROMPT, PROMPT[3:9], PROMPT[:1]]
    llm = LLM(directory, dtype=dtype, max_num_batched_tokens=20)
    answers = chosen(llm, prompts)
    assert answers == chosen(LLM(directory, dtype=dtype, enforce_eager=True), prompts)
    assert answers == [chosen(llm, [prompt])[0] for prompt in prompts]
    for prompt, (ids, logprobs) in zip(prompts, answers, strict=True):
        logits = llm.logits(prompt + ids)[len(prompt) - 1 : -1]
        assert logprobs == log_probs(logits, torch.tensor(ids)[:, None])[:, 0].tolist()


def test_a_captured_step_is_native_throughout(models: Callable[[str], tuple[Any, Path]]) -> None:
    llm = LLM(models("qwen3_moe")[1])
    chosen(llm, [PROMPT])
    (step,) = llm._engine.runner._steps.values()
    names = step._run.__self__.names()
    assert names.count("quant_moe") == names.count("moe_gate") == 2  # of three layers
    assert names[-1] == "sampling"


@pytest.mark.parametrize(
    ("case", "dtype"),
    some(
        [("mixtral", torch.float32), ("qwen3 moe", torch.bfloat16)],
        ("olmoe", torch.float32),
        ("olmoe", torch.bfloat16),
        ("mixtral", torch.bfloat16),
        ("qwen3 moe", torch.float32),
    ),
)
def test_generation_has_trainings_log_probs_after_every_step(case: str, dtype: torch.dtype) -> None:
    model = model_of(case, dtype)
    llm = LLM.from_model(model, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=16)
    optimizer = AdamW([{"params": list(model.parameters()), "lr": 0.02}])
    prompts = random_documents((5, 61, 1), seed=3)
    seen: list[object] = []
    for step in range(2):
        answers = chosen(llm, prompts)
        assert answers not in seen
        seen.append(answers)
        whole = [prompt + ids for prompt, (ids, _) in zip(prompts, answers, strict=True)]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                logp, _ = model.log_probs(*batch_of(whole))
            rows = logp.split([len(ids) for ids in whole])
            for ids, (new, got), own in zip(whole, answers, rows, strict=True):
                assert got == own[len(ids) - len(new) - 1 : -1].tolist(), f"gradients {grad}"
        model.loss(*batch_of(random_documents((40, 24), seed=step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.weights_changed()
    # of 1, 2 and 4 slots: weights changed in place, and nothing was captured anew
    assert len(llm._engine.runner._steps) <= 3


def test_generation_follows_a_routers_bias() -> None:
    model = model_of("deepseek v3 experts", torch.float32)
    llm = LLM.from_model(model, max_model_len=128)
    before = chosen(llm, [PROMPT])
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias.add_(torch.arange(8.0))
    after = chosen(llm, [PROMPT])  # the captured steps read the buffer
    assert after != before
    assert after == chosen(LLM.from_model(model, enforce_eager=True), [PROMPT])
