"""Answers have the same bits whatever the engine does meanwhile: the order of arrival, the batch,
few pages and preemption, what is found in the prefix cache, chunks, captured steps or none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastllm import LLM, RequestOutput, SamplingParams
from fastllm.engine.scheduler import Growth, Scheduler
from fastllm.engine.sequence import State
from fastllm.models.decoder import Decoder
from fastllm.nn.lora import LoraConfig, adapters_disabled, add_lora, lora_parameters
from fastllm.testing.small_models import batch_of, model_of, random_documents

CASES = ["llama tied, biases", "qwen3 moe", "deepseek v3 experts"]
ROOMY: dict[str, Any] = {"max_num_seqs": 16}
WAYS: dict[str, dict[str, Any]] = {
    "few pages": {"num_pages": 4, "max_num_seqs": 8},
    "few pages, eager, small chunks": {
        "num_pages": 5, "max_num_seqs": 6, "max_num_batched_tokens": 40, "enforce_eager": True
    },
    "no prefix cache": {"num_pages": 7, "max_num_seqs": 5, "enable_prefix_caching": False},
    "one at a time": {"max_num_seqs": 1, "max_num_batched_tokens": 64},
}  # fmt: skip


def _prompts() -> list[list[int]]:
    """Lengths around a page's, beginnings that others share, one twice."""
    prompts = random_documents((1, 63, 64, 66, 130), seed=3)
    return [*prompts, prompts[4][:100], [*prompts[4][:64], 7, 8, 9], list(prompts[3])]


def _params() -> list[SamplingParams]:
    base = SamplingParams(temperature=0.9, max_tokens=40, detokenize=False, ignore_eos=True)
    return [
        replace(base, seed=1, n=3),
        replace(base, seed=2, repetition_penalty=1.3, frequency_penalty=0.4),
        replace(base, seed=3, n=2, top_p=0.8, top_k=30, logprobs=2),
        replace(base, seed=4, min_tokens=30, stop_token_ids=list(range(0, 96, 4))),
        replace(base, seed=5, n=2, max_tokens=70, temperature=1.0),
        replace(base, seed=6, prompt_logprobs=1, n=2),
        replace(base, seed=7, presence_penalty=0.7, min_tokens=5, stop_token_ids=[3]),
        replace(base, temperature=0.0, max_tokens=66),
    ]


def _bits(outputs: Sequence[RequestOutput]) -> list[object]:
    return [
        (out.prompt_logprobs, [(o.token_ids, o.token_logprobs, o.sampled_logprobs, o.logprobs,
                                o.cumulative_logprob, o.finish_reason) for o in out.outputs])
        for out in outputs
    ]  # fmt: skip


def _run(llm: LLM, order: Sequence[int] | None = None) -> list[object]:
    """All requests at once, given in this order; the answers in the order of _prompts."""
    prompts, params = _prompts(), _params()
    order = range(len(prompts)) if order is None else order
    outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order])
    pool = llm._engine.cache.pool
    assert llm._engine.scheduler.idle and pool.free_pages == pool.num_pages
    by_prompt = dict(zip(order, _bits(outputs), strict=True))
    return [by_prompt[i] for i in range(len(prompts))]


def _preempt_at_random(scheduler: Scheduler, rng: random.Random) -> None:
    """Besides those for want of pages."""
    grow = scheduler.grow

    def preempting() -> Growth:
        growth = grow()
        if len(scheduler.running) > 1 and rng.random() < 0.2:
            growth.moves += scheduler._preempt(rng.choice(scheduler.running))
            growth.grown = [s for s in growth.grown if s.state is State.RUNNING]
        return growth

    scheduler.grow = preempting  # type: ignore[method-assign]


def _each_alone(llm: LLM) -> list[object]:
    found: list[object] = []
    for prompt, params in zip(_prompts(), _params(), strict=True):
        llm.reset_prefix_cache()
        found += _bits(llm.generate(prompt, params))
    return found


@pytest.mark.parametrize(("case", "kv"), [(c, "auto") for c in CASES] + [(CASES[0], "int8")])
def test_answers_do_not_depend_on_what_else_the_engine_does(case: str, kv: str) -> None:
    model = model_of(case, torch.float32).requires_grad_(False)
    wanted = _each_alone(LLM.from_model(model, kv_cache_dtype=kv, **ROOMY))
    rng = random.Random(5)
    for way, options in {"roomy": ROOMY, **WAYS}.items():
        llm = LLM.from_model(model, kv_cache_dtype=kv, **options)
        if "few" in way:
            _preempt_at_random(llm._engine.scheduler, rng)
        assert _run(llm) == wanted, way
        order = rng.sample(range(len(wanted)), len(wanted))
        assert _run(llm, order) == wanted, f"{way}, again, in another order: {order}"
        if "few" in way:
            assert llm._engine.scheduler.preemptions > 20


@pytest.mark.parametrize("case", CASES[:2])
def test_preempted_and_cached_answers_have_trainings_log_probs(case: str) -> None:
    model = model_of(case, torch.bfloat16)
    llm = LLM.from_model(model, num_pages=4, max_num_seqs=8)
    params = SamplingParams(n=4, temperature=0.8, max_tokens=90, seed=1, detokenize=False)
    prompt = random_documents((70,), seed=1)[0]
    outputs = llm.generate([prompt, prompt[:66]], [params, replace(params, ignore_eos=True)])
    assert llm._engine.scheduler.preemptions
    for out in outputs:
        whole = [out.prompt_token_ids + o.token_ids for o in out.outputs]
        documents, targets = batch_of(whole)
        with torch.no_grad():
            logp, _ = model.log_probs(documents, targets, temperature=0.8)
        for o, part in zip(out.outputs, logp.split([len(ids) for ids in whole]), strict=True):
            assert o.sampled_logprobs == part[len(out.prompt_token_ids) - 1 : -1].tolist()


def test_streams_preempted_and_closed_leave_the_others_alone() -> None:
    model = model_of(CASES[0], torch.float32).requires_grad_(False)
    params = SamplingParams(n=2, seed=3, max_tokens=100, detokenize=False, ignore_eos=True)
    prompts = random_documents((20, 70, 100, 64), seed=9)
    wanted = [LLM.from_model(model).generate(p, params)[0].outputs for p in prompts]
    llm = LLM.from_model(model, num_pages=5, max_num_seqs=6)
    streams = [llm.generate(p, params, stream=True) for p in prompts]
    last = {i: next(stream) for i, stream in enumerate(streams) if i in (0, 2)}
    next(streams[1])
    streams[1].close()
    streams[3].close()  # before it has begun
    for i in last:
        for item in streams[i]:
            last[i] = item
        assert [o.token_ids for o in last[i].outputs] == [o.token_ids for o in wanted[i]]
    assert llm._engine.scheduler.idle and llm._engine.cache.free_pages == 5


PROMPT = random_documents((150,), seed=2)[0]
FEW = SamplingParams(temperature=1.0, max_tokens=5, seed=1, detokenize=False, prompt_logprobs=None)


def _computed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of positions of every prefill from now on."""
    counts: list[int] = []
    prefill = llm._engine.runner.prefill

    def counted(ids: Any, starts: Any, pages: Any) -> torch.Tensor:
        counts.append(sum(map(len, ids)))
        return prefill(ids, starts, pages)

    monkeypatch.setattr(llm._engine.runner, "prefill", counted)
    return counts


def test_a_prompt_that_comes_again_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM.from_model(model_of(CASES[0], torch.float32))
    counts = _computed(llm, monkeypatch)
    for n in (1, 5, 1):
        llm.generate(PROMPT, replace(FEW, n=n))
    llm.generate([PROMPT, PROMPT[:140], [*PROMPT, 1]], FEW)
    assert counts == [149, 139 - 128 + 150 - 128]
    llm.reset_prefix_cache()
    llm.generate(PROMPT, FEW)
    assert counts[2:] == [149]


def _change(model: Decoder, kind: str) -> None:
    with torch.no_grad():
        parameters = list(lora_parameters(model).values()) or list(model.parameters())
        if kind == "torch":
            parameters[1].add_(0.5)
        elif kind == "native":  # autograd's version counters do not see it
            parameters[1].detach().numpy()[...] += 0.5
            model.weights_changed()
        elif kind == "moved":
            parameters[1].data = parameters[1].data + 0.5


@pytest.mark.parametrize("kind", ["torch", "native", "moved"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_changed_weights_find_nothing(
    lora: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(CASES[0], torch.float32)
    if lora:
        add_lora(model, LoraConfig(r=4, target_modules=("q_proj", "down_proj")))
    llm = LLM.from_model(model)
    counts = _computed(llm, monkeypatch)
    before = _bits(llm.generate(PROMPT, FEW))
    _change(model, kind)
    after = _bits(llm.generate(PROMPT, FEW))
    assert counts == [149, 149] and before != after
    assert after == _bits(LLM.from_model(model).generate(PROMPT, FEW))


def test_adapters_that_are_switched_off_or_come_later_find_nothing() -> None:
    model = model_of(CASES[0], torch.float32)
    llm = LLM.from_model(model)
    plain = _bits(llm.generate(PROMPT, FEW))
    for parameter in add_lora(model, LoraConfig(r=4)):
        torch.nn.init.normal_(parameter)
    adapted = _bits(llm.generate(PROMPT, FEW))
    assert adapted == _bits(LLM.from_model(model).generate(PROMPT, FEW)) != plain
    with adapters_disabled(model):
        assert _bits(llm.generate(PROMPT, FEW)) == plain
    assert _bits(llm.generate(PROMPT, FEW)) == adapted


def test_weights_that_change_in_a_stream_leave_no_page_behind() -> None:
    model = model_of(CASES[0], torch.float32)
    llm = LLM.from_model(model)
    stream = llm.generate(PROMPT, replace(FEW, max_tokens=100, ignore_eos=True), stream=True)
    next(stream)
    _change(model, "native")
    *_, last = stream
    again = [*PROMPT, *last.outputs[0].token_ids]
    assert _bits(llm.generate(again, FEW)) == _bits(LLM.from_model(model).generate(again, FEW))


def test_the_number_of_pages_bounds_the_context() -> None:
    model = model_of(CASES[0], torch.float32)
    assert LLM.from_model(model, num_pages=2).max_model_len == 128
    with pytest.raises(ValueError, match=r"max_model_len 200.*at most 128"):
        LLM.from_model(model, num_pages=2, max_model_len=200)
    for wrong in (0, 2.5):
        with pytest.raises((ValueError, TypeError), match="num_pages"):
            LLM.from_model(model, num_pages=wrong)  # type: ignore[arg-type]
    llm = LLM.from_model(model, num_pages=2)
    out = llm.generate([PROMPT[:60]] * 3, SamplingParams(max_tokens=None, detokenize=False))
    assert [len(o.outputs[0].token_ids) for o in out] == [68] * 3


@pytest.mark.parametrize("where", ["set_slot", "prefill", "decode", "add_page"])
def test_an_interrupted_step_leaves_nothing_behind(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM.from_model(model_of(CASES[0], torch.float32), num_pages=6, max_num_seqs=4)
    params = replace(FEW, n=3, max_tokens=60, ignore_eos=True)
    prompts = [PROMPT[:70], PROMPT[:30], PROMPT[:140]]
    wanted = _bits(llm.generate(prompts, params))
    for calls in (0, 1):
        llm.reset_prefix_cache()
        left = iter(range(calls))
        original = getattr(llm._engine.runner, where)

        def interrupted(*args: Any, left: Any = left, original: Any = original) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(llm._engine.runner, where, interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(prompts, params)
        assert llm._engine.scheduler.idle and llm._engine.cache.free_pages == 6
        assert not llm._engine.scheduler.prefix._computing
        assert _bits(llm.generate(prompts, params)) == wanted
