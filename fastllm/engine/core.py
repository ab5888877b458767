"""The engine: requests in, steps, tokens out. `LLM` and `AsyncLLM` are its faces.

`step` admits what fits, prefills a stretch of prompts and decodes one token for every running
sample. Whoever waits for a request calls `step` until it has what it wants, so several callers,
streaming or not, share one engine and its batches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from fastllm.engine.cache import PagedCache, pages_for
from fastllm.engine.inbox import Inbox
from fastllm.engine.logprobs import logprob_rows
from fastllm.engine.request import RequestOutput
from fastllm.engine.runner import LOGITS_ROWS, Runner
from fastllm.engine.scheduler import Chunk, Move, Scheduler
from fastllm.engine.sequence import Request, Sequence
from fastllm.errors import NumericalError
from fastllm.models.decoder import Decoder


class Engine:
    """A model with its cache, scheduler and captured steps. Safe to call from several threads."""

    def __init__(
        self, model: Decoder, cache: PagedCache, *, max_seqs: int, max_pages: int,
        max_batched_tokens: int, graphs: bool, prefix_caching: bool,
    ) -> None:  # fmt: skip
        self.model = model
        self.cache = cache
        self.scheduler = Scheduler(cache, max_seqs, max_batched_tokens, prefix_caching)
        self.runner = Runner(model, cache, slots=max_seqs, max_pages=max_pages, graphs=graphs)
        self._lock = threading.RLock()

    def add(self, requests: Iterable[Request], inbox: Inbox) -> None:
        """Queue requests; what becomes of them is told to `inbox`."""
        with self._lock:
            for request in requests:
                request.inbox = inbox
                inbox.unfinished += 1
                self.scheduler.add(request)

    def refresh(self) -> None:
        """Take note of changed weights, before a generation: see `Runner.refresh`."""
        with self._lock:
            if self.runner.refresh():
                self.scheduler.prefix.clear()

    def reset_prefix_cache(self) -> None:
        """Forget what the unused pages of the cache hold."""
        with self._lock:
            self.scheduler.prefix.clear()

    def step(self) -> None:
        """Advance everything that runs by one token, and prompts by one stretch."""
        with self._lock:
            if self.runner.stale:
                self.refresh()
            for sequence in self.scheduler.admit():
                self._start(sequence)
            chunks = self.scheduler.next_chunks()
            if chunks:
                self._prefill(chunks)
            if self.scheduler.running:
                self._make_room()
                self._decode()

    def outputs(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """The states of requests between two steps, whoever makes them."""
        with self._lock:
            return [request.output() for request in requests]

    def news(self, inbox: Inbox) -> list[RequestOutput]:
        """The states of the requests that have grown since the last call."""
        with self._lock:
            return self.outputs(inbox.take())

    def ended(self, inbox: Inbox) -> list[tuple[Request, RequestOutput]]:
        """The requests that have ended since the last call, and what became of them."""
        with self._lock:
            return [(request, request.output()) for request in inbox.take() if request.finished]

    def abort(self, request: Request) -> None:
        """Stop a request, whatever state it is in, and free its slots and pages."""
        with self._lock:
            if request.finished:
                return
            for sample in request.samples:
                if sample.finish_reason is None:
                    sample.finish_reason = "abort"
            request.inbox.unfinished -= 1
            self._move(self.scheduler.abort(request))

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits of every position, float32 [len(ids), vocab]."""
        with self._lock:
            count = len(ids)
            pages = self.cache.pool.allocate(pages_for(count))
            rows = torch.empty(count, self.model.config.vocab_size, device=self.model.device)
            try:
                for start in range(0, count, self.scheduler.max_batched_tokens):
                    stop = min(start + self.scheduler.max_batched_tokens, count)
                    hidden = self.runner.prefill([ids[start:stop]], [start], [pages])
                    for at in range(start, stop, LOGITS_ROWS):
                        part = hidden[at - start : at - start + LOGITS_ROWS]
                        rows[at : at + part.shape[0]] = self.runner.logits(part)
            finally:
                self.cache.pool.release(pages)
            return rows

    def _start(self, sequence: Sequence) -> None:
        """All tokens but the last are in the cache: decode from there."""
        request, params, drawn = sequence.request, sequence.request.params, sequence.token_ids
        slot = self.scheduler.start(sequence)
        last = drawn[-1] if drawn else request.prompt_ids[-1]
        self.runner.set_slot(slot, last, sequence.length - 1, sequence.pages)
        banned: list[int] = []
        if params.min_tokens > len(drawn):
            banned = sorted({*request.end_ids, *(params.stop_token_ids or ())})
        self.runner.sampler.set(slot, params, sequence.seed, request.prompt_ids, drawn, banned)

    def _make_room(self) -> None:
        """Pages for the next tokens; who gives way for them leaves its slot."""
        growth = self.scheduler.grow()
        self._move(growth.moves)
        for sequence in growth.grown:
            place = len(sequence.pages) - 1
            self.runner.add_page(sequence.slot, place, sequence.pages[place])

    def _move(self, moves: Iterable[Move]) -> None:
        for hole, last in moves:
            self.runner.free_slot(hole, last)

    def _prefill(self, chunks: list[Chunk]) -> None:
        hidden = self.runner.prefill(
            [c.ids for c in chunks], [c.start for c in chunks], [c.sequence.pages for c in chunks]
        )
        first = 0
        for chunk in chunks:
            rows = hidden[first : first + chunk.stop - chunk.start]
            first += chunk.stop - chunk.start
            if chunk.sequence.index == 0 and chunk.sequence.request.prompt_logprobs is not None:
                self._add_prompt_logprobs(chunk, rows)
        for sequence in self.scheduler.advance(chunks):
            self._start(sequence)

    def _add_prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> None:
        """Those that are not known yet: a preempted sample computes some rows again."""
        request = chunk.sequence.request
        count = request.params.prompt_logprobs
        assert count is not None and request.prompt_logprobs is not None
        while (token := len(request.prompt_logprobs)) < len(request.prompt_ids):
            row = token - 1 - chunk.start  # predicts the token
            logits = self.runner.logits(hidden[row : row + LOGITS_ROWS])
            if not logits.shape[0]:
                break
            tokens = request.prompt_ids[token : token + logits.shape[0]]
            found = logprob_rows(logits[: len(tokens)], tokens, count, request.tokenizer)
            request.prompt_logprobs += found

    def _decode(self) -> None:
        running = self.scheduler.running
        if not running:
            return
        ids, logprobs, sampled = (a.tolist() for a in self.runner.decode(len(running)))
        wanted = any(s.logprobs is not None for s in running)
        logits = self.runner.last_logits(len(running)) if wanted else None
        ended = []
        for slot, sequence in enumerate(running):
            token, request = ids[slot], sequence.request
            request.inbox.grown[request] = None
            if token < 0:
                self._fail(sequence)
                ended.append(sequence)
                continue
            if logits is not None and sequence.logprobs is not None:
                count, row = request.params.logprobs or 0, logits[slot : slot + 1]
                sequence.logprobs += logprob_rows(row, [token], count, request.tokenizer)
            sequence.append(token, logprobs[slot], sampled[slot])
            if sequence.finish_reason is not None:
                ended.append(sequence)
            elif len(sequence.token_ids) == request.params.min_tokens:
                self.runner.sampler.unban(slot)
        for sequence in ended:
            self._move([self.scheduler.retire(sequence)])
        for request in dict.fromkeys(sequence.request for sequence in ended):
            request.inbox.unfinished -= request.finished

    def _fail(self, sequence: Sequence) -> None:
        """The model gave NaN: let the owner raise. The others never see it: attention reads nothing
        of a page behind the positions that a sequence has written."""
        request = sequence.request
        position = len(request.prompt_ids) + len(sequence.token_ids)
        request.error = NumericalError(
            f"request {request.request_id}: the logits for position {position} hold NaN or no "
            "finite value. The weights are damaged or overflow in this dtype: check them with "
            "`fastllm inspect`, or load with dtype='float32'"
        )
        request.inbox.error = request.inbox.error or request.error
        sequence.finish_reason = "error"
