"""SmolLM2-135M Q4_1 beside a float32 model of its dequantized weights, and beside transformers.

The float32 model is transformers' own, in float32, so nothing of fastllm's compute is in it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import LLM, SamplingParams
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import GGUFWeights, open_weights
from fastllm.ops.log_probs import log_probs

transformers = pytest.importorskip("transformers")

PROMPTS = [
    "What is the capital of Italy?", "Write a haiku about the sea.", "Explain what a prime is.",
    "List three uses of copper.", "Who wrote Hamlet?", "Translate 'good morning' to French.",
    "Why is the sky blue?", "Give me a recipe for pancakes.", "What is 17 plus 25?",
    "Describe a cat in one sentence.", "How do airplanes fly?", "Name a famous painter.",
    "What is photosynthesis?", "Tell me a short joke.", "How many legs has a spider?",
    "What does DNA stand for?", "Write a Python function that adds two numbers.",
    "What is the largest planet?", "Summarize the story of Cinderella.", "What causes rain?",
]  # fmt: skip
MARGIN = 0.3  # of float32 logits: below it, quantization of activations may choose the other token


def _hf_model(source: GGUFWeights, dtype: torch.dtype) -> Any:
    values = source.config.to_hf()
    values.pop("architectures")
    values.pop("model_type")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    weights = {name: source.get(name).to_float32() for name in source.names}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.to(dtype)


@pytest.fixture(scope="module")
def source(real_model: Path) -> GGUFWeights:
    opened = open_weights(real_model)
    assert isinstance(opened, GGUFWeights)
    return opened


@pytest.fixture(scope="module")
def exact(source: GGUFWeights) -> Any:
    return _hf_model(source, torch.float32)


@pytest.fixture(scope="module")
def tokenizer(source: GGUFWeights) -> Tokenizer:
    return Tokenizer.from_gguf(source.file.metadata)


def _logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def _chat_ids(llm: LLM, prompt: str) -> list[int]:
    text = llm.chat_template.render([{"role": "user", "content": prompt}])
    return llm.tokenizer.encode(text, add_special_tokens=False)


def _relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_float32_compute_is_the_float32_model(real_model: Path, exact: Any) -> None:
    llm = LLM(real_model, activation="fp32")
    ids = _chat_ids(llm, PROMPTS[0])
    assert _relative_error(llm.logits(ids), _logits(exact, ids)) < 2e-5


def test_bf16_logits_are_near_and_nearer_than_transformers(
    real_model: Path, source: GGUFWeights, exact: Any
) -> None:
    llm = LLM(real_model, activation="bf16")
    peer = _hf_model(source, torch.bfloat16)
    errors, peers, sizes = 0.0, 0.0, 0.0
    for prompt in PROMPTS[:: 1 if os.environ.get("FASTLLM_TEST_FULL") == "1" else 5]:
        ids = _chat_ids(llm, prompt)
        want = _logits(exact, ids)
        errors += float((llm.logits(ids) - want).square().sum())
        peers += float((_logits(peer, ids) - want).square().sum())
        sizes += float(want.square().sum())
    assert math.sqrt(errors / sizes) <= 0.017
    assert errors < peers


def _check_greedy(llm: LLM, exact: Any, prompts: list[str], tokens: int) -> None:
    """Where our greedy answer leaves the float32 model's, that model was nearly undecided."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompt_ids = [_chat_ids(llm, prompt) for prompt in prompts]
    for ids, out in zip(prompt_ids, llm.generate(prompt_ids, params), strict=True):
        answer = out.outputs[0].token_ids
        assert len(answer) == tokens
        logits = _logits(exact, ids + answer)[len(ids) - 1 : -1]
        differs = (logits.argmax(1) != torch.tensor(answer)).nonzero()
        if len(differs):  # up to here both models have read the same tokens
            top = logits[differs[0, 0]].topk(2).values
            assert float(top[0] - top[1]) < MARGIN, (out.outputs[0].text, int(differs[0, 0]))


def test_greedy_answers_leave_the_float32_model_only_where_it_is_undecided(
    real_model: Path, exact: Any
) -> None:
    _check_greedy(LLM(real_model, activation="bf16"), exact, PROMPTS[::7], 32)


@pytest.mark.full
def test_twenty_greedy_answers_leave_it_only_where_it_is_undecided(
    real_model: Path, exact: Any
) -> None:
    _check_greedy(LLM(real_model, activation="bf16"), exact, PROMPTS, 64)


def _perplexities(llm: LLM, exact: Any, ids: list[int], window: int) -> tuple[float, float]:
    """Of the model and of the float32 one, over windows of tokens."""
    losses = torch.zeros(2, dtype=torch.float64)
    count = 0
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        targets = torch.tensor(part[1:]).unsqueeze(1)
        for i, logits in enumerate((llm.logits(part), _logits(exact, part))):
            losses[i] -= log_probs(logits[:-1].contiguous(), targets).double().sum()
        count += window - 1
    ours, theirs = (losses / count).exp().tolist()
    return ours, theirs


def _topics(tokenizer: Tokenizer, tokens: int) -> list[int]:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return tokenizer.encode(text[: 8 * tokens])[:tokens]


def test_int8_perplexity_is_near_the_float32_models(
    real_model: Path, exact: Any, tokenizer: Tokenizer
) -> None:
    ours, theirs = _perplexities(LLM(real_model), exact, _topics(tokenizer, 1024), 512)
    assert abs(ours / theirs - 1) < 0.02  # 1,022 tokens: the full test has the bound of 0.5%


@pytest.mark.full
def test_int8_perplexity_on_20000_tokens_is_within_half_a_percent(
    real_model: Path, exact: Any, tokenizer: Tokenizer
) -> None:
    ours, theirs = _perplexities(LLM(real_model), exact, _topics(tokenizer, 20_000), 1000)
    assert abs(ours / theirs - 1) < 0.005, (ours, theirs)


def test_parity_holds_on_the_real_model(real_model: Path) -> None:
    llm = LLM(real_model)
    ids = _chat_ids(llm, PROMPTS[1])
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=0, ignore_eos=True)
    answer = llm.generate([ids] * 8, params)[3].outputs[0]
    alone = llm.generate(ids, params)[0].outputs[0]
    assert alone.token_ids == answer.token_ids and alone.logprobs == answer.logprobs
    everything = ids + answer.token_ids
    logits = llm.logits(everything)[len(ids) - 1 : -1].contiguous()
    forced = log_probs(logits, torch.tensor(answer.token_ids).unsqueeze(1))[:, 0].tolist()
    got = [e[t].logprob for t, e in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert got == forced
    chunked = LLM(real_model, max_num_batched_tokens=13).logits(everything)
    assert torch.equal(chunked, llm.logits(everything))


def test_streams_of_a_real_tokenizer_add_up(real_model: Path) -> None:
    llm = LLM(real_model)
    params = SamplingParams(temperature=1.5, max_tokens=60, seed=3, min_tokens=60)
    prompts = ["用中文写一首诗", "Emoji: 🎉🦊👩‍👩‍👧", "Ça va?"]
    whole = llm.generate(prompts, params)
    texts = ["", "", ""]
    order = {out.prompt: i for i, out in enumerate(whole)}
    for item in llm.generate(prompts, params, stream=True):
        texts[order[item.prompt]] += item.outputs[0].delta
    for text, out in zip(texts, whole, strict=True):
        assert text == out.outputs[0].text == llm.tokenizer.decode(out.outputs[0].token_ids)


_MEMORY = """
import re, sys
import fastllm, torch
from fastllm.engine import llm as _
def anonymous():
    fields = open("/proc/self/smaps_rollup").read()
    return 1024 * int(re.search(r"Anonymous: +([0-9]+) kB", fields)[1])
before = anonymous()
model = fastllm.LLM(sys.argv[1])
model.generate([1], fastllm.SamplingParams(max_tokens=8, ignore_eos=True))
print(anonymous() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's smaps")
def test_a_loaded_model_is_not_much_larger_than_its_file(real_model: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(real_model)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) <= 1.3 * real_model.stat().st_size
