"""Generation on a model whose answer is known: text, streams, stops, samples, batches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.errors import ModelFileError, NumericalError
from fastllm.models.config import ModelConfig
from fastllm.models.safetensors_files import save_directory
from fastllm.testing.random_model import random_weights

TEXT = "中🎉é END.quick*"  # what the chain model says after "*", again and again
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def llm(chain_model: Path) -> LLM:
    return LLM(chain_model, max_num_seqs=4, max_num_batched_tokens=16)


def test_greedy_text_is_what_the_weights_say(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    out = llm.generate("*", SamplingParams(**GREEDY, max_tokens=len(ids)))[0]
    assert out.finished and out.prompt == "*" and out.prompt_token_ids == ids[-1:]
    answer = out.outputs[0]
    assert answer.text == answer.delta == TEXT
    assert answer.token_ids == ids
    assert answer.finish_reason == "length" and answer.stop_reason is None
    assert -1e-3 < answer.cumulative_logprob <= 0


@pytest.mark.parametrize("count", [1, 3, 5, 9, 20, 40])
def test_streamed_deltas_add_up_to_the_text(llm: LLM, count: int) -> None:
    params = SamplingParams(**GREEDY, max_tokens=count)
    whole = llm.generate("*", params)[0].outputs[0]
    items = list(llm.generate("*", params, stream=True))
    assert len(items) == count  # one for every token
    assert "".join(item.outputs[0].delta for item in items) == whole.text
    assert items[-1].outputs[0].text == whole.text and items[-1].finished
    for item in items[:-1]:
        assert whole.text.startswith(item.outputs[0].text) and not item.finished
        assert "\ufffd" not in item.outputs[0].delta


@pytest.mark.parametrize("stop", ["END", "D.q", "é E", "🎉", "k*中"])
def test_stop_strings_split_across_tokens_end_the_answer(llm: LLM, stop: str) -> None:
    params = SamplingParams(**GREEDY, max_tokens=60, stop=["nowhere", stop])
    items = list(llm.generate("*", params, stream=True))
    answer = items[-1].outputs[0]
    forever = TEXT * 4
    assert answer.text == forever[: forever.index(stop)]
    assert "".join(item.outputs[0].delta for item in items) == answer.text
    assert answer.finish_reason == "stop" and answer.stop_reason == stop


def test_stop_string_can_be_kept(llm: LLM) -> None:
    params = SamplingParams(**GREEDY, max_tokens=60, stop="END", include_stop_str_in_output=True)
    assert llm.generate("*", params)[0].outputs[0].text == "中🎉é END"


def test_stop_token_ends_the_answer_without_its_text(llm: LLM) -> None:
    q = llm.tokenizer.encode("q")[0]
    params = SamplingParams(**GREEDY, max_tokens=60, stop_token_ids=[q])
    answer = llm.generate("*", params)[0].outputs[0]
    assert answer.text == "中🎉é END." and answer.token_ids[-1] == q
    assert answer.finish_reason == "stop" and answer.stop_reason == q


def test_min_tokens_holds_stops_and_ends_back(llm: LLM) -> None:
    count = len(llm.tokenizer.encode(TEXT))
    params = SamplingParams(**GREEDY, max_tokens=60, min_tokens=count, stop="END")
    answer = llm.generate("*", params)[0].outputs[0]
    assert answer.text == TEXT + "中🎉é "
    first = llm.tokenizer.encode("中")[0]
    held = SamplingParams(**GREEDY, max_tokens=3, min_tokens=2, stop_token_ids=[first])
    assert first not in llm.generate("*", held)[0].outputs[0].token_ids[:2]


def test_eos_of_the_model_ends_the_answer_unless_ignored(llm: LLM) -> None:
    eos = llm.generate("~", SamplingParams(**GREEDY, max_tokens=3))[0].outputs[0]
    assert eos.token_ids == [256] and eos.text == ""
    assert eos.finish_reason == "stop" and eos.stop_reason is None
    on = llm.generate("~", SamplingParams(**GREEDY, max_tokens=3, ignore_eos=True))[0].outputs[0]
    assert on.token_ids == [256, 0, 0]  # they have no successor: ties go to the lower id
    held = SamplingParams(**GREEDY, max_tokens=3, min_tokens=2)
    assert 256 not in llm.generate("~", held)[0].outputs[0].token_ids


def test_unequal_prompts_together_are_what_they_are_alone(llm: LLM) -> None:
    prompts = ["*", "é END.", "中", "quick*中🎉", "E", "q" * 100, "x*"]
    params = SamplingParams(**GREEDY, max_tokens=11)
    together = llm.generate(prompts, params)  # 7 prompts in 4 slots, 16 prompt tokens a step
    for prompt, out in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, params)[0].outputs[0]
        assert out.prompt == prompt
        assert out.outputs[0].token_ids == alone.token_ids
        assert out.outputs[0].cumulative_logprob == alone.cumulative_logprob


def test_each_prompt_can_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(**GREEDY, max_tokens=n) for n in (2, 7)]
    outs = llm.generate(["*", "*"], params)
    assert [len(out.outputs[0].token_ids) for out in outs] == [2, 7]
    with pytest.raises(ValueError, match="2 prompts and 1 sampling_params"):
        llm.generate(["*", "*"], params[:1])


def test_interleaved_streams_share_the_engine(llm: LLM) -> None:
    params = SamplingParams(**GREEDY, max_tokens=12)
    want = llm.generate("*", params)[0].outputs[0].text
    first, second = (llm.generate("*", params, stream=True) for _ in range(2))
    texts = ["", ""]
    for _ in range(12):
        for i, stream in enumerate((first, second)):
            texts[i] += "".join(item.outputs[0].delta for item in [next(stream, None)] if item)
    for i, stream in enumerate((first, second)):
        texts[i] += "".join(item.outputs[0].delta for item in stream)
    assert texts == [want, want]


def test_threads_share_the_engine(llm: LLM) -> None:
    params = SamplingParams(**GREEDY, max_tokens=40)
    want = llm.generate("*", params)[0].outputs[0].text

    def read(streaming: bool) -> str:
        if not streaming:
            return llm.generate("*", params)[0].outputs[0].text
        return "".join(item.outputs[0].delta for item in llm.generate("*", params, stream=True))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, [True, False] * 8)) == [want] * 16


def test_a_closed_stream_frees_its_pages_and_slot(llm: LLM) -> None:
    cache, scheduler = llm._engine.cache, llm._engine.scheduler
    free = cache.free_pages
    stream = llm.generate(["*", "é"], SamplingParams(n=3, max_tokens=100), stream=True)
    next(stream)
    assert cache.free_pages < free
    stream.close()
    assert cache.free_pages == free == cache.num_pages and scheduler.idle


def test_outputs_come_whole_in_the_order_in_which_prompts_end(llm: LLM) -> None:
    prompts = ["*", "x", "*"]
    params = [SamplingParams(**GREEDY, max_tokens=n, ignore_eos=True, n=1) for n in (9, 3, 6)]
    found = list(llm.generate_as_finished(prompts, params))
    assert [number for number, _ in found] == [1, 2, 0]
    whole = llm.generate(prompts, params)
    assert all(output.outputs == whole[number].outputs for number, output in found)
    ended = llm.generate_as_finished(prompts, params)
    next(ended)
    ended.close()  # type: ignore[attr-defined]
    assert llm._engine.scheduler.idle
    with pytest.raises(ValueError, match="prompt"):
        llm.generate_as_finished([[]], params[0])


def test_an_unread_stream_starts_nothing(llm: LLM) -> None:
    llm.generate("*", SamplingParams(), stream=True)
    assert llm._engine.scheduler.idle


def test_logprobs_are_vllms(llm: LLM) -> None:
    params = SamplingParams(**GREEDY, max_tokens=2, logprobs=2, prompt_logprobs=1)
    out = llm.generate("*中", params)[0]
    answer = out.outputs[0]
    for token, entries in zip(answer.token_ids, answer.logprobs, strict=True):
        assert token in entries and len(entries) == 2  # the chosen token is among the best two
        assert entries[token].rank == 1
    total = sum(e[t].logprob for t, e in zip(answer.token_ids, answer.logprobs, strict=True))
    assert total == pytest.approx(answer.cumulative_logprob, abs=1e-6)
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(out.prompt_token_ids) == 4
    for token, entries in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True):
        assert entries[token].rank == 1 and entries[token].logprob > -1e-3
    e4 = out.prompt_token_ids[1]
    assert out.prompt_logprobs[1][e4].decoded_token == "\ufffd"  # half a character


def test_logprobs_of_zero_report_the_chosen_token_alone(llm: LLM) -> None:
    out = llm.generate("*", SamplingParams(temperature=5.0, max_tokens=4, logprobs=0, seed=1))[0]
    answer = out.outputs[0]
    assert [list(entries) for entries in answer.logprobs] == [[t] for t in answer.token_ids]


@pytest.mark.parametrize("length", [1, 2, 16, 63, 64, 65, 129])
def test_samples_of_a_prompt_share_its_pages_and_equal_separate_requests(
    random_model: Callable[[str], Path], length: int
) -> None:
    llm = LLM(random_model("q4_0"), max_num_seqs=3, max_num_batched_tokens=50, max_model_len=256)
    prompt = [(7 * i) % 400 for i in range(length)]
    common = {"temperature": 1.0, "max_tokens": 8, "detokenize": False}
    outs = llm.generate(prompt, SamplingParams(**common, n=5, seed=42))[0].outputs
    assert [o.index for o in outs] == list(range(5))
    for i, out in enumerate(outs):
        single = llm.generate(prompt, SamplingParams(**common, seed=42 + i))[0].outputs[0]
        assert out.token_ids == single.token_ids
        assert out.cumulative_logprob == single.cumulative_logprob
    assert len({tuple(o.token_ids) for o in outs}) == 5
    assert llm._engine.cache.free_pages == llm._engine.cache.num_pages


def test_seed_is_drawn_and_reported(random_model: Callable[[str], Path]) -> None:
    llm = LLM(random_model("q4_0"), max_num_seqs=2)
    params = SamplingParams(max_tokens=12, detokenize=False)
    first, second = (llm.generate([1, 2], params)[0] for _ in range(2))
    assert first.seed != second.seed
    assert first.outputs[0].token_ids != second.outputs[0].token_ids
    again = SamplingParams(max_tokens=12, detokenize=False, seed=first.seed)
    assert llm.generate([1, 2], again)[0].outputs[0].token_ids == first.outputs[0].token_ids


def test_penalties_follow_a_sample_that_changes_slots(random_model: Callable[[str], Path]) -> None:
    llm = LLM(random_model("q4_0"), max_num_seqs=3)
    penalized = SamplingParams(
        temperature=0, max_tokens=30, detokenize=False, frequency_penalty=1.5, presence_penalty=0.5,
        repetition_penalty=1.3,
    )  # fmt: skip
    short = SamplingParams(temperature=0, max_tokens=3, detokenize=False, presence_penalty=1.0)
    alone = llm.generate([5, 6, 7], penalized)[0].outputs[0].token_ids
    prompts = [[9], [8, 1], [5, 6, 7], [4], [3]]
    outs = llm.generate(prompts, [short, short, penalized, short, short])
    assert outs[2].outputs[0].token_ids == alone
    assert len(set(alone)) > 20  # and they do something


def test_nan_logits_raise_naming_the_request_and_spare_the_engine(nan_model: Path) -> None:
    llm = LLM(nan_model, max_num_seqs=2)
    with pytest.raises(NumericalError, match=r"request \d+.*position.*NaN.*float32"):
        llm.generate(["é", "*"], SamplingParams(**GREEDY, max_tokens=30))
    assert llm._engine.scheduler.idle
    assert llm._engine.cache.free_pages == llm._engine.cache.num_pages
    out = llm.generate("*", SamplingParams(**GREEDY, max_tokens=8))[0].outputs[0]
    assert out.text.startswith("中🎉")


def test_bad_prompts_are_named_before_anything_runs(llm: LLM) -> None:
    vocab = llm.config.vocab_size
    longest = llm.max_model_len
    for prompts, error, words in (
        (["*", ""], ValueError, "prompt 1 is empty"),
        ([[1], []], ValueError, "prompt 1 is empty"),
        ([[1, vocab]], ValueError, rf"prompt 0: token id {vocab}"),
        ([[1, -1]], ValueError, "prompt 0: token id -1"),
        ([[1.5]], TypeError, "prompt 0 must hold integer"),
        (["*", "x" * longest], ValueError, f"prompt 1 has {longest} tokens.*{longest - 1}"),
        (["\ud800"], ValueError, "prompt 0"),
        (b"*", TypeError, "prompts must be"),
        (7, TypeError, "prompts must be"),
        ([None], TypeError, "prompt 0"),
    ):
        with pytest.raises(error, match=words):
            llm.generate(prompts, SamplingParams())  # type: ignore[call-overload]
        assert llm._engine.scheduler.idle
    with pytest.raises(ValueError, match="stop_token_ids"):
        llm.generate("*", SamplingParams(stop_token_ids=[vocab]))
    with pytest.raises(TypeError, match="sampling_params"):
        llm.generate(["*"], [{"n": 1}])  # type: ignore[call-overload]
    assert llm.generate([], SamplingParams()) == []


def test_the_context_limits_the_answer(llm: LLM) -> None:
    prompt = "x" * (llm.max_model_len - 3)
    out = llm.generate(prompt, SamplingParams(**GREEDY, max_tokens=None))[0].outputs[0]
    assert len(out.token_ids) == 3 and out.finish_reason == "length"


def test_chat_renders_the_template_and_refuses_bad_messages(llm: LLM) -> None:
    out = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(**GREEDY, max_tokens=1))[0]
    assert out.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    both = llm.chat([[{"role": "user", "content": c}] for c in "ab"], SamplingParams(max_tokens=1))
    assert [o.prompt.count("a<") for o in both] == [1, 0]
    with pytest.raises((ValueError, TypeError)):
        llm.chat([{"role": "user", "content": 5}])
    with pytest.raises((ValueError, TypeError)):
        llm.chat([])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("dtype", "float16", "dtype"),
        ("device", "tpu", "device"),
        ("device", "meta", "device"),
        ("device", "warp drive", "device"),
        ("device", "cuda:99", "CUDA device"),
        ("device", 5, "device"),
        ("activation", "int4", "activation"),
        ("activation", "int8", "quantized"),
        ("max_model_len", 1, "max_model_len"),
        ("max_model_len", 10**9, "max_model_len"),
        ("kv_cache_dtype", "int4", "kv_cache_dtype"),
        ("max_num_seqs", 0, "max_num_seqs"),
        ("max_num_seqs", 2.5, "max_num_seqs"),
        ("max_num_batched_tokens", 0, "max_num_batched_tokens"),
    ],
)
def test_bad_options_are_named(chain_model: Path, option: str, value: object, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        LLM(chain_model, **{option: value})


def test_a_head_dim_without_a_kernel_is_named_and_runs_eagerly(tmp_path: Path) -> None:
    config = ModelConfig(
        model_type="llama", vocab_size=64, hidden_size=40, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=20,
        rms_norm_eps=1e-5, max_position_embeddings=64, dtype=torch.float32,
    )  # fmt: skip
    save_directory(tmp_path / "model", random_weights(config), config.to_hf())
    with pytest.raises(ModelFileError, match=r"head_dim.*20.*enforce_eager"):
        LLM(tmp_path / "model")
    llm = LLM(tmp_path / "model", enforce_eager=True)
    params = SamplingParams(**GREEDY, max_tokens=3, detokenize=False)
    assert len(llm.generate([[1, 2]], params)[0].outputs[0].token_ids) == 3
