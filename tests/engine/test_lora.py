"""Generation with an adapter: never merged, and a token's bits are the same in every phase."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastllm import LLM, SamplingParams
from fastllm.models.gguf_export import export_hf, weights_of
from fastllm.models.trainable import load_trainable
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents
from fastllm.nn.lora import LoraConfig, adapters_disabled, add_lora, lora_parameters
from fastllm.ops.log_probs import log_probs

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


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0", "dense"])
def test_training_has_the_bits_of_generation_after_every_update(
    format: str, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    if format == "dense":
        export_hf(weights_of(open_weights(random_model("bf16"))), tmp_path / "m", "bf16", None)
    model = load_trainable(tmp_path / "m" if format == "dense" else random_model(format))
    parameters = add_lora(model, SOME, seed=1)
    llm = LLM.from_model(model)
    prompt = [(31 * i + i * i) % 400 for i in range(40)]
    seen = set()
    for _ in range(3):
        ids, logprobs = _chosen(llm, prompt)
        hidden = model.train_hidden(Documents.pack([prompt + ids[:-1]]))
        assert hidden.requires_grad
        logits = model.logits(hidden)[len(prompt) - 1 :]
        targets = torch.tensor(ids).unsqueeze(1)
        assert log_probs(logits.detach(), targets)[:, 0].tolist() == logprobs
        seen.add(tuple(logprobs))
        torch.nn.functional.cross_entropy(logits, targets[:, 0]).backward()
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None and parameter.grad.isfinite().all()
                step = 0.05 * parameter.grad.sign()
                parameter.sub_(step.to(parameter.dtype))
                parameter.grad = None
        model.weights_changed()
    assert len(seen) == 3
    prompt_only = model.train_hidden(Documents.pack([prompt]))
    with adapters_disabled(model), torch.no_grad():
        base = model.train_hidden(Documents.pack([prompt]))
    assert not torch.equal(base, prompt_only)
