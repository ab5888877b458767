"""Generation with an adapter: never merged, and a token's bits are the same in every phase."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastllm import LLM, SamplingParams
from fastllm.nn.lora import LoraConfig, add_lora, lora_parameters
from fastllm.ops.sampling import log_probs

MODELS = [("bf16", {}), ("f32", {"dtype": "float32"}), ("q8_0", {})] + [
    (format, {"activation": "bf16"}) for format in ("q4_0", "q4_1", "q8_0")
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False, logprobs=0)
SOME = LoraConfig(r=8, alpha=16, target_modules=("q_proj", "v_proj", "o_proj", "up_proj"))


def _adapted(path: Path, **options: Any) -> LLM:
    llm = LLM(path, **options)
    add_lora(llm.model, SOME, seed=1)
    _set_b(llm.model, seed=2)
    return llm


def _set_b(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)


def _chosen(llm: LLM, prompt: list[int]) -> tuple[list[int], list[float]]:
    out = llm.generate([prompt], GREEDY)[0].outputs[0]
    assert out.logprobs is not None
    return out.token_ids, [e[t].logprob for t, e in zip(out.token_ids, out.logprobs, strict=True)]


def _forced(llm: LLM, prompt: list[int], ids: list[int]) -> list[float]:
    logits = llm.logits(prompt + ids)[len(prompt) - 1 : -1]
    return log_probs(logits, torch.tensor(ids).unsqueeze(1))[:, 0].tolist()


@pytest.mark.parametrize(("format", "options"), MODELS)
def test_captured_steps_have_the_bits_of_prefill_and_follow_the_parameters(
    format: str, options: dict[str, Any], random_model: Callable[[str], Path]
) -> None:
    prompt = [(37 * i + i * i) % 400 for i in range(60)]
    path = random_model(format)
    llm = _adapted(path, **options)
    ids, logprobs = _chosen(llm, prompt)
    assert logprobs == _forced(llm, prompt, ids)
    assert logprobs != _chosen(LLM(path, **options), prompt)[1]
    assert (ids, logprobs) == _chosen(_adapted(path, enforce_eager=True, **options), prompt)
    _set_b(llm.model, seed=3)  # the captured steps read the parameters: nothing to refresh
    ids, changed = _chosen(llm, prompt)
    assert changed == _forced(llm, prompt, ids) and changed != logprobs
