"""A sample in the making: its tokens, pages, slot, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fastllm.engine.inbox import Inbox
from fastllm.engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams
from fastllm.models.detokenizer import Detokenizer, StopMatcher
from fastllm.models.tokenizer import Tokenizer


class State(Enum):
    """Where a sample is."""

    NEW = "new"
    QUEUED = "queued"  # or preempted; or it waits for another sample's pages
    PREFILLING = "prefilling"
    RUNNING = "running"
    ENDED = "ended"  # or aborted


@dataclass(eq=False, slots=True)
class Request:
    """A prompt, its parameters and its samples."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int  # what params and the context allow
    end_ids: frozenset[int]  # the model's own ends of sequence, empty with ignore_eos
    tokenizer: Tokenizer | None  # None: no text is made
    samples: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    arrival: int = -1  # the scheduler's count of requests
    inbox: Inbox = field(default_factory=Inbox)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.samples = [Sequence(self, index) for index in range(self.params.n)]
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finish_reason is not None for sample in self.samples)

    def output(self) -> RequestOutput:
        """The state now; the deltas are what was added since the previous call."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.output() for sample in self.samples],
            finished=self.finished,
            seed=self.seed,
        )


class Sequence:
    """One sample of a request."""

    __slots__ = (
        "_delta", "_detokenizer", "_stop_ids", "_stops", "cumulative_logprob", "epoch",
        "finish_reason", "followers", "index", "logprobs", "page_names", "pages", "prefilled",
        "request", "room", "sampled_logprobs", "slot", "state", "stop_reason", "text", "token_ids",
        "token_logprobs",
    )  # fmt: skip

    def __init__(self, request: Request, index: int) -> None:
        params = request.params
        self.request = request
        self.index = index
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self.token_ids: list[int] = []
        self.token_logprobs: list[float] = []
        self.sampled_logprobs: list[float] = []
        self.logprobs: list[dict[int, Logprob]] | None = None
        if params.logprobs is not None:
            self.logprobs = []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.text = ""
        self._delta = ""
        self._detokenizer: Detokenizer | None = None
        self._stops: StopMatcher | None = None
        if request.tokenizer is not None:
            self._detokenizer = request.tokenizer.detokenizer()
        if params.stop:
            self._stops = StopMatcher(params.stop, params.include_stop_str_in_output)
        # The scheduler's
        self.state = State.NEW
        self.slot = -1
        self.pages: list[int] = []
        self.room = 0  # tokens of the answer for which the pages suffice
        self.prefilled = 0  # positions in the cache, while it is not running
        self.followers: list[Sequence] = []  # they wait for pages that this one computes
        # The prefix cache's
        self.page_names: list[bytes] = []
        self.epoch = -1

    @property
    def seed(self) -> int:
        """Of this sample: samples of one request differ by their seeds alone."""
        return (self.request.seed + self.index + 2**63) % 2**64 - 2**63

    @property
    def age(self) -> tuple[int, int]:
        """Who came first is least."""
        return self.request.arrival, self.index

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def reusable(self) -> int:
        """How many positions may be taken from the cache: all that a prefill writes, or those whose
        prompt_logprobs are known."""
        known = self.request.prompt_logprobs
        if known is not None and self.index == 0 and len(known) < len(self.request.prompt_ids):
            return len(known) - 1
        return self.length - 1

    def ids(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop - 1 of prompt and answer."""
        prompt = self.request.prompt_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        behind = self.token_ids[max(start - len(prompt), 0) : stop - len(prompt)]
        return prompt[start:] + behind

    def append(self, token: int, logprob: float, sampled_logprob: float) -> None:
        """Add a token; sets `finish_reason` if the sample ends with it."""
        request, params = self.request, self.request.params
        self.token_ids.append(token)
        self.token_logprobs.append(logprob)
        self.sampled_logprobs.append(sampled_logprob)
        self.cumulative_logprob += logprob
        count = len(self.token_ids)
        may_stop = count >= params.min_tokens
        ended = may_stop and (token in request.end_ids or token in self._stop_ids)
        if ended:
            self.stop_reason = token if token in self._stop_ids else None
        elif self._detokenizer is not None:
            self._add_text(self._detokenizer.push(token), may_stop)
        if ended or self.stop_reason is not None:
            self._finish("stop")
        elif count >= request.max_tokens:
            self._finish("length")

    def _add_text(self, text: str, may_stop: bool = True) -> None:
        if self._stops is not None:
            text = self._stops.push(text, may_stop)
            if self._stops.matched is not None:
                self.stop_reason = self._stops.matched
        self._delta += text

    def _finish(self, reason: str) -> None:
        """Flush held text: a stop string may be complete only now."""
        if self._detokenizer is not None and (self._stops is None or self._stops.matched is None):
            self._add_text(self._detokenizer.flush())
            if self._stops is not None and self._stops.matched is None:
                self._delta += self._stops.flush()
            elif self._stops is not None:
                reason = "stop"
        self.finish_reason = reason

    def output(self) -> CompletionOutput:
        """The state now, and what is new since the previous call."""
        delta, self._delta = self._delta, ""
        self.text += delta
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.token_ids),
            cumulative_logprob=self.cumulative_logprob,
            token_logprobs=list(self.token_logprobs),
            sampled_logprobs=list(self.sampled_logprobs),
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            delta=delta,
        )
