"""`AsyncLLM`: many consumers of one engine in asyncio. The names and meanings are vLLM's.

One background thread steps the engine while there is anything to do; it alone touches the engine.
Consumers post what they want (requests, aborts) and are woken in their own event loops.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastllm.engine.arguments import Prompt
from fastllm.engine.inbox import Inbox
from fastllm.engine.llm import LLM
from fastllm.engine.request import RequestOutput, SamplingParams
from fastllm.engine.sequence import Request
from fastllm.models.tokenizer import Tokenizer


class _Consumer:
    """Who waits for a request: lives in an event loop, is fed from the engine's thread."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None

    def post(self, output: RequestOutput | None, error: BaseException | None = None) -> None:
        """Engine's thread: hand over an output or an error. A closed loop wants neither."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._receive, output, error)

    def _receive(self, output: RequestOutput | None, error: BaseException | None) -> None:
        if output is not None:
            self._output = output if self._output is None else _merged(self._output, output)
        self._error = self._error or error
        self._news.set()

    async def take(self) -> RequestOutput:
        """What is new since the last call, all of it in one. Raises the request's error."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise self._error
        assert self._output is not None, "there is an output or an error"
        output, self._output = self._output, None
        return output


class AsyncLLM:
    """A model that answers many at once, each in its own `async for`.

        llm = AsyncLLM("smollm2")
        async for output in llm.generate("Hello", SamplingParams(max_tokens=50)):
            print(output.outputs[0].delta, end="")

    Args:
        model, options: those of `LLM`.

    It may be used from several event loops. Call `shutdown` (or leave `async with`) at the end.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self._attach(LLM(model, **options))

    @classmethod
    def from_llm(cls, llm: LLM) -> AsyncLLM:
        """Over an `LLM` that there is, of live weights for example; it can be used beside."""
        made = cls.__new__(cls)
        made._attach(llm)
        return made

    def _attach(self, llm: LLM) -> None:
        self.llm = llm
        self._engine = llm._engine
        self._inbox = Inbox()
        self._consumers: dict[str, _Consumer] = {}  # of requests that have not ended
        self._orders: deque[Callable[[], None]] = deque()  # for the engine's thread
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._stepping = False
        self._closed = False
        # threads of native code are counted per thread that calls it
        self._thread = ThreadPoolExecutor(
            1, "fastllm-engine", torch.set_num_threads, (torch.get_num_threads(),)
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.llm.tokenizer

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput]:  # fmt: skip
        """Continue a prompt, a string or token ids; yields its state each time it has grown.

        A consumer that is slower than the engine gets several tokens at once. Leaving the loop, or
        cancelling the task, aborts the request. request_id: for `abort`; default a number.

        Raises TypeError or ValueError at the first item, naming what is wrong with the prompt, the
        parameters or the id; NumericalError if the model gives NaN for this request.
        """
        number = next(self._numbers)
        name = f"async-{number}" if request_id is None else request_id
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        request = self.llm._requests.make_one(prompt, params, "the prompt", request_id=name)
        consumer = _Consumer(request)
        with self._lock:
            if self._closed:
                raise RuntimeError("this AsyncLLM has been shut down")
            if name in self._consumers:
                raise ValueError(f"request_id {name!r} is in use: wait for its end, or abort it")
            self._consumers[name] = consumer
            self._order(partial(self._add, consumer))
        try:
            finished = False
            while not finished:
                output = await consumer.take()
                finished = output.finished
                yield output
        finally:
            with self._lock:
                if self._take_out(consumer):
                    self._order(partial(self._engine.abort, request))

    async def abort(self, request_id: str) -> None:
        """End a request: its consumer gets what there is, with finish_reason "abort".

        Unknown and ended ones are passed over.
        """
        with self._lock:
            consumer = self._consumers.get(request_id)
            if consumer is not None:
                self._order(partial(self._abort, consumer))

    async def reset_prefix_cache(self) -> None:
        """See `LLM.reset_prefix_cache`."""
        self._order(self._engine.reset_prefix_cache)

    def shutdown(self) -> None:
        """Abort all requests and end the engine's thread."""
        with self._lock:
            self._closed = True
            for consumer in self._consumers.values():
                self._order(partial(self._abort, consumer))
        self._thread.shutdown()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    # The engine's thread

    def _order(self, order: Callable[[], None]) -> None:
        """Any thread: have something done before the next step."""
        with self._lock:
            self._orders.append(order)
            if not self._stepping:
                self._stepping = True
                self._thread.submit(self._run).add_done_callback(self._ran)

    def _run(self) -> None:
        """Steps until nothing is left to do, or the program's main thread has ended."""
        inbox = self._inbox
        while threading.main_thread().is_alive():
            while self._orders:
                self._orders.popleft()()
            if inbox.unfinished:
                self._engine.step()
            self._deliver()
            with self._lock:
                # an `LLM` beside this one makes steps too, so there can be news at any time
                if not (self._orders or inbox.unfinished or inbox.grown):
                    self._stepping = False
                    return

    def _ran(self, future: Future[None]) -> None:
        """What a step raised is everybody's: memory, a bug. Those who come later start anew."""
        error = future.exception()
        if error is None:
            return
        with self._lock:
            self._stepping = False
            for consumer in list(self._consumers.values()):
                self._take_out(consumer)
                consumer.post(None, error)
                self._order(partial(self._engine.abort, consumer.request))

    def _take_out(self, consumer: _Consumer) -> bool:
        """Forget a consumer; False if that has been done."""
        with self._lock:
            name = consumer.request.request_id
            known = self._consumers.get(name) is consumer
            if known:
                del self._consumers[name]
            return known

    def _add(self, consumer: _Consumer) -> None:
        if self._consumers.get(consumer.request.request_id) is consumer:
            self._engine.refresh()
            self._engine.add([consumer.request], self._inbox)

    def _abort(self, consumer: _Consumer) -> None:
        if self._take_out(consumer):
            self._engine.abort(consumer.request)
            consumer.post(self._engine.outputs([consumer.request])[0])

    def _deliver(self) -> None:
        """Everyone gets what is theirs."""
        for output in self._engine.news(self._inbox):
            consumer = self._consumers.get(output.request_id)
            if consumer is None:
                continue  # gone: its abort is on the way
            error = consumer.request.error
            if output.finished or error is not None:
                self._take_out(consumer)
            if error is not None:
                self._engine.abort(consumer.request)
            consumer.post(output, error)


def _merged(old: RequestOutput, new: RequestOutput) -> RequestOutput:
    """`new`, with what was new in `old` too."""
    outputs = [
        replace(after, delta=before.delta + after.delta)
        for before, after in zip(old.outputs, new.outputs, strict=True)
    ]
    return replace(new, outputs=outputs)
