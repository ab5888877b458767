"""What `generate`, `chat` and `demo` share: loading, sampling parameters, printing a stream."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from .console import note
from .parsing import use_threads

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from ..engine.llm import LLM
    from ..engine.request import RequestOutput, SamplingParams


def load(options: Namespace, **more: Any) -> LLM:
    """The model that the options name, with a line on stderr that says how long loading took.

    more: further arguments of `LLM`.
    """
    from ..engine.llm import LLM
    from ..quantize.rule import FallbackWarning

    use_threads(options.threads)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # said below
        llm = LLM(
            options.model,
            dtype=options.dtype,
            device=options.device,
            activation=options.activation,
            max_model_len=options.max_model_len,
            kv_cache_dtype=options.kv_cache_dtype,
            adapter=options.adapter,
            quantization=options.quant,
            **more,
        )
    report = llm.model.quantization
    for line in [] if report is None else [report.summary(), *report.fallbacks()]:
        note(line)
    note(f"{options.model} loaded in {time.perf_counter() - start:.2f} s")
    return llm


def sampling_params(options: Namespace, **more: Any) -> SamplingParams:
    """SamplingParams of the sampling options of a command."""
    from ..engine.request import SamplingParams

    names = (
        "max_tokens min_tokens temperature top_k top_p min_p repetition_penalty "
        "presence_penalty frequency_penalty seed stop"
    ).split()
    return SamplingParams(**{name: getattr(options, name) for name in names}, **more)


@dataclass(kw_only=True, slots=True)
class Speed:
    """How fast an answer came: seconds to its first token, and tokens a second after that."""

    tokens: int = 0
    first: float = 0.0
    total: float = 0.0

    def __str__(self) -> str:
        later = self.total - self.first
        rate = f", {(self.tokens - 1) / later:.0f} tok/s" if self.tokens > 1 and later > 0 else ""
        return f"{self.tokens} tokens{rate}, first after {self.first:.2f} s"


@dataclass(slots=True)
class Stop:
    """Whether Ctrl-C was pressed."""

    requested: bool = False


@contextmanager
def ctrl_c_stops() -> Iterator[Stop]:
    """Inside, the first Ctrl-C sets a flag, so that a step ends cleanly; the second one raises."""
    stop = Stop()

    def request(signum: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def print_stream(stream: Iterable[RequestOutput]) -> tuple[str, Speed]:
    """Print an answer as it comes; Ctrl-C ends it.

    Returns:
        The text that was printed, and how fast it came.
    """
    speed, text, start = Speed(), "", time.perf_counter()
    iterator = iter(stream)
    with ctrl_c_stops() as stop:
        for item in iterator:
            answer = item.outputs[0]
            print(answer.delta, end="", flush=True)
            text = answer.text
            speed.total = time.perf_counter() - start
            if not speed.tokens:
                speed.first = speed.total
            speed.tokens = len(answer.token_ids)
            if stop.requested:
                break
    if isinstance(iterator, Iterator) and hasattr(iterator, "close"):
        iterator.close()  # frees the request's pages in the engine at once
    print(flush=True)
    return text, speed
