"""Many consumers in asyncio: texts, cancellation, aborts, errors, several event loops."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastllm import LLM, AsyncLLM, RequestOutput, SamplingParams
from fastllm.errors import NumericalError

TEXT = "中🎉é END.quick*"  # what the chain model says after "*", again and again
GREEDY = {"temperature": 0.0}
FOREVER = SamplingParams(**GREEDY, max_tokens=None, ignore_eos=True)


@pytest.fixture
def llm(chain_model: Path) -> Iterator[AsyncLLM]:
    made = AsyncLLM(chain_model, max_num_seqs=4, max_num_batched_tokens=16)
    yield made
    made.shutdown()
    scheduler, pool = made._engine.scheduler, made._engine.cache.pool
    assert scheduler.idle and pool.free_pages == pool.num_pages and not made._consumers


async def _read(llm: AsyncLLM, prompt: str, params: SamplingParams) -> tuple[str, RequestOutput]:
    deltas = ""
    async for output in llm.generate(prompt, params):
        deltas += output.outputs[0].delta
        last = output
    return deltas, last


async def _until_idle(llm: AsyncLLM) -> None:
    async with asyncio.timeout(20):
        while not llm._engine.scheduler.idle:
            await asyncio.sleep(0.005)


def test_many_consumers_get_what_each_would_alone(llm: AsyncLLM) -> None:
    prompts = ["*", "é END.", "中", "quick*中🎉", "E", "q" * 100, "x*"] * 3
    params = [SamplingParams(**GREEDY, max_tokens=3 + i % 9) for i in range(len(prompts))]
    wanted = llm.llm.generate(prompts, params)

    async def read_all() -> list[tuple[str, RequestOutput]]:
        return await asyncio.gather(*map(_read, [llm] * len(prompts), prompts, params))

    for (deltas, got), want in zip(asyncio.run(read_all()), wanted, strict=True):
        assert got.finished and got.prompt == want.prompt
        assert deltas == got.outputs[0].text == want.outputs[0].text
        assert got.outputs[0].token_logprobs == want.outputs[0].token_logprobs


def test_outputs_come_while_the_answer_grows(llm: AsyncLLM) -> None:
    async def lengths() -> list[int]:
        params = SamplingParams(
            **GREEDY, max_tokens=250
        )  # more than come while a loop is kept waiting
        return [len(out.outputs[0].token_ids) async for out in llm.generate("*", params)]

    seen = asyncio.run(lengths())
    assert seen == sorted(set(seen)) and seen[-1] == 250 and len(seen) > 3


def test_a_slow_consumer_gets_several_tokens_at_once_and_loses_none(llm: AsyncLLM) -> None:
    async def read() -> tuple[str, str, int]:
        deltas, count = "", 0
        async for output in llm.generate("*", SamplingParams(**GREEDY, max_tokens=100)):
            deltas += output.outputs[0].delta
            count += 1
            await asyncio.sleep(0.03)
        return deltas, output.outputs[0].text, count

    deltas, text, count = asyncio.run(read())
    assert deltas == text and count < 100


def test_cancelling_a_task_or_leaving_the_loop_aborts_the_request(llm: AsyncLLM) -> None:
    async def run() -> None:
        task = asyncio.create_task(_read(llm, "*", FOREVER))
        async for _ in llm.generate("*", FOREVER):
            break
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _until_idle(llm)

    asyncio.run(run())


def test_abort_ends_a_request_in_every_state(llm: AsyncLLM) -> None:
    """Six requests for four slots: decoding, in a long prompt, and waiting."""

    async def run() -> list[RequestOutput]:
        prompts = ["*", "*", "*", "q" * 200, "x", "y"]

        async def last(name: str, prompt: str) -> RequestOutput:
            items = llm.generate(prompt, FOREVER, request_id=name)
            return [output async for output in items][-1]

        tasks = [asyncio.create_task(last(str(i), p)) for i, p in enumerate(prompts)]
        await asyncio.sleep(0.02)
        for i in reversed(range(6)):
            await llm.abort(str(i))
        await llm.abort("unknown")
        return await asyncio.gather(*tasks)

    outputs = asyncio.run(run())
    assert all(output.finished for output in outputs)
    reasons = {output.outputs[0].finish_reason for output in outputs}
    assert "abort" in reasons and reasons <= {"abort", "length"}  # one may have been that quick


def test_bad_requests_raise_at_the_first_item_and_spare_the_others(llm: AsyncLLM) -> None:
    async def run() -> str:
        good = asyncio.create_task(_read(llm, "*", SamplingParams(**GREEDY, max_tokens=20)))
        for prompt, words in (("", "the prompt is empty"), ([1, 999], "token id 999")):
            with pytest.raises(ValueError, match=words):
                await anext(llm.generate(prompt))
        with pytest.raises(TypeError, match="sampling_params"):
            await anext(llm.generate("*", {"n": 1}))  # type: ignore[arg-type]
        first = llm.generate("*", FOREVER, request_id="same")
        await anext(first)
        with pytest.raises(ValueError, match="'same' is in use"):
            await anext(llm.generate("*", FOREVER, request_id="same"))
        await first.aclose()
        return (await good)[0]

    assert asyncio.run(run()).startswith(TEXT[:3])


def test_nan_is_the_error_of_its_own_request(nan_model: Path) -> None:
    async def run() -> tuple[object, object]:
        async with AsyncLLM(nan_model, max_num_seqs=4) as llm:
            long = SamplingParams(**GREEDY, max_tokens=40)
            short = SamplingParams(**GREEDY, max_tokens=8)
            return await asyncio.gather(
                _read(llm, "*", long), _read(llm, "*", short), return_exceptions=True
            )

    failed, (text, _) = asyncio.run(run())  # type: ignore[misc]
    assert isinstance(failed, NumericalError) and text.startswith("中🎉")


def test_what_a_step_raises_reaches_everyone_and_the_next_request_is_served(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(count: int) -> None:
        raise OSError("the device is gone")

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(llm._engine.runner, "decode", broken)
            results = await asyncio.gather(
                *(_read(llm, "*", FOREVER) for _ in range(3)), return_exceptions=True
            )
            assert [str(result) for result in results] == ["the device is gone"] * 3
        text, _ = await _read(llm, "*", SamplingParams(**GREEDY, max_tokens=9))
        assert TEXT.startswith(text)

    asyncio.run(run())


def test_an_llm_beside_it_shares_the_engine(chain_model: Path) -> None:
    shared = LLM(chain_model, max_num_seqs=4)
    params = SamplingParams(**GREEDY, max_tokens=50)
    wanted = shared.generate("*", params)[0].outputs[0].text

    async def run() -> None:
        async with AsyncLLM.from_llm(shared) as llm:
            beside = asyncio.to_thread(shared.generate, ["*"] * 3, params)
            (text, _), outputs = await asyncio.gather(_read(llm, "*", params), beside)
            assert text == wanted and {out.outputs[0].text for out in outputs} == {wanted}

    asyncio.run(run())


def test_after_shutdown_it_says_so(chain_model: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(chain_model) as llm:
            stream = llm.generate("*", FOREVER)
            await anext(stream)
        *_, last = [output async for output in stream]
        assert last.outputs[0].finish_reason in ("abort", "length")
        with pytest.raises(RuntimeError, match="shut down"):
            await anext(llm.generate("*"))

    asyncio.run(run())


def test_a_program_ends_though_nobody_shuts_down(chain_model: Path) -> None:
    code = f"""
import asyncio
from fastllm import AsyncLLM, SamplingParams
llm = AsyncLLM({str(chain_model)!r}, max_model_len=256)
async def run():
    async for _ in llm.generate("*", SamplingParams(max_tokens=200)):
        break
asyncio.run(run())
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "end\n" and not done.stderr
