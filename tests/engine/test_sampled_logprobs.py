"""The log-probabilities that answers carry are those of training, raw and at the temperature."""

from __future__ import annotations

import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.engine.request import CompletionOutput
from fastllm.models.decoder import Decoder
from fastllm.testing.small_models import batch_of, model_of, random_documents

PROMPTS = random_documents((5, 61, 1), seed=3)  # one crosses into the second page as it goes on


def _answers(model: Decoder, eager: bool = False, **fields: object) -> list[CompletionOutput]:
    llm = LLM.from_model(model, max_model_len=128, max_num_seqs=4, enforce_eager=eager)
    params = SamplingParams(max_tokens=9, seed=1, detokenize=False, ignore_eos=True, **fields)
    return [out.outputs[0] for out in llm.generate(PROMPTS, params)]


def _of_training(
    model: Decoder, answers: list[CompletionOutput], temperature: float
) -> list[list[float]]:
    whole = [prompt + answer.token_ids for prompt, answer in zip(PROMPTS, answers, strict=True)]
    documents, targets = batch_of(whole)
    with torch.no_grad():
        logp, _ = model.log_probs(documents, targets, temperature=temperature)
    parts = logp.split([len(ids) for ids in whole])
    return [
        part[len(prompt) - 1 : -1].tolist() for part, prompt in zip(parts, PROMPTS, strict=True)
    ]


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "eager"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", ["llama tied, biases", "qwen3 moe"])
def test_both_are_those_of_training(case: str, temperature: float, eager: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(case, dtype)
        answers = _answers(model, eager, temperature=temperature, top_k=20, top_p=0.9)
        raw, sampled = (_of_training(model, answers, t) for t in (1.0, temperature))
        assert [answer.token_logprobs for answer in answers] == raw
        assert [answer.sampled_logprobs for answer in answers] == sampled
        assert (raw == sampled) == (temperature == 1)


def test_greedy_answers_report_the_raw_one_twice() -> None:
    model = model_of("llama", torch.float32)
    answers = _answers(model, temperature=0.0)
    wanted = _of_training(model, answers, 1.0)
    assert [answer.sampled_logprobs for answer in answers] == wanted
    assert [answer.token_logprobs for answer in answers] == wanted
    for answer in answers:
        assert answer.cumulative_logprob == sum(answer.token_logprobs)


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "eager"])
@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3},
        {"min_tokens": 5, "stop_token_ids": list(range(0, 96, 3))},
        {"min_tokens": 4, "stop_token_ids": [7], "repetition_penalty": 1.2},
    ],
    ids=["penalties", "min_tokens", "both"],
)
def test_penalties_and_bans_do_not_change_what_is_reported(
    fields: dict[str, object], eager: bool
) -> None:
    model = model_of("llama tied, biases", torch.float32)
    answers = _answers(model, eager, temperature=0.7, **fields)
    assert [a.token_logprobs for a in answers] == _of_training(model, answers, 1.0)
    assert [a.sampled_logprobs for a in answers] == _of_training(model, answers, 0.7)
