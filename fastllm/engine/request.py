"""What a caller asks for and what comes back, with vLLM's names and meanings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_SAMPLES = 128  # n: samples of one prompt that share its pages
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BANNED = 64  # ids that min_tokens can hold back: width of a static buffer of the decode step


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to continue a prompt. Every field is checked here, once.

    n: independent samples per prompt (seeds seed, seed + 1, ...).
    max_tokens: at most so many tokens each; None: until the context is full.
    min_tokens: ends of sequence and stops do not count before so many tokens.
    temperature: 0 is greedy (ties go to the lower id); at most 1e6.
    top_k: sample from the k most probable tokens; 0 or -1: from all.
    top_p: ... from the smallest set whose probability reaches p.
    min_p: ... from tokens at least min_p times as probable as the most probable one.
    repetition_penalty: divides positive logits of tokens of prompt and answer, multiplies negative;
        from 0.001 to 1000.
    presence_penalty, frequency_penalty: subtracted once, and once per occurrence in the answer.
    stop: strings that end the answer; the text ends before them.
    stop_token_ids: tokens that end the answer; their text is left out.
    include_stop_str_in_output: keep the stop string in the text.
    seed: of the draws; None: a random one, reported as `RequestOutput.seed`.
    ignore_eos: go on after the model's end of sequence.
    logprobs: report the k most probable tokens at each position, and the chosen one.
    prompt_logprobs: the same for the prompt's tokens.
    detokenize: False: leave `text` empty (no tokenizer is needed).

    Raises TypeError or ValueError naming the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    include_stop_str_in_output: bool = False
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_SAMPLES)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1, optional=True)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 1e6)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)  # no overflow of logits
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("seed", self.seed, -(2**63), 2**63 - 1, optional=True)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r:.80}")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must not exceed max_tokens, got {self.min_tokens} and "
                f"{self.max_tokens}"
            )
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n must be 1 when temperature is 0, got {self.n}: greedy samples are all equal. "
                "Raise the temperature"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; use stop_token_ids instead")


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token at a position, its rank (1 = most probable), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One sample.

    text: the whole answer so far; delta: what of it is new since the previous item of the stream
    (all of it when not streaming). logprobs: per token, {token id: Logprob}. cumulative_logprob:
    sum of the tokens' raw log-probabilities. finish_reason: None (unfinished), "stop", "length"
    or "abort" (`AsyncLLM.abort`). stop_reason: the stop string or stop token id, None for the
    model's own end of sequence.

    token_logprobs: each token's log-probability, raw. sampled_logprobs: the same at the request's
    temperature, before penalties, min_tokens, min_p, top_k and top_p; greedy (temperature 0): the
    raw one. Both are float32 values, and those of `Decoder.log_probs(..., temperature=...)` bit
    for bit.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    token_logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    delta: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A prompt and its samples; with stream=True, their state after some more tokens.

    prompt: its text, None if token ids were given. prompt_logprobs: per prompt token, None for the
    first. seed: of the first sample.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    seed: int


def _integer(name: str, value: Any, low: int, high: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    if not low <= value <= high:
        bound = f"at least {low}" if high >= 2**31 - 1 and value < low else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r:.80}")
    if not math.isfinite(value) or value < low or value > high or (above and value == low):
        least = f"above {low:g}" if above else f"at least {low:g}"
        raise ValueError(f"{name} must be {least} and at most {high:g}, got {value}")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    if not isinstance(stop, Iterable):
        raise TypeError(f"stop must be a string or several of them, got {stop!r:.80}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop may hold at most {MAX_STOPS} strings, got {len(stops)}")
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"stop must hold strings, got {text!r:.80}")
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise ValueError(
                f"a stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(text)}"
            )
    return stops


def _stop_ids(ids: Any) -> tuple[int, ...]:
    if ids is not None and not isinstance(ids, Iterable):
        raise TypeError(f"stop_token_ids must be a list of integers, got {ids!r:.80}")
    ids = () if ids is None else tuple(ids)
    if len(ids) > MAX_BANNED // 2:
        raise ValueError(f"stop_token_ids may hold at most {MAX_BANNED // 2} ids, got {len(ids)}")
    for token in ids:
        _integer("stop_token_ids", token, 0, 2**31 - 1)
    return ids
