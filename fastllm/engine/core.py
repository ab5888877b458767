"""The engine: requests in, steps, tokens out. `LLM` is its face.

`step` admits what fits, prefills a stretch of prompts and decodes one token for every running
sample. Whoever waits for a request calls `step` until it has what it wants, so several callers,
streaming or not, share one engine and its batches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from fastllm.engine.cache import PagedCache
from fastllm.engine.logprobs import logprob_rows
from fastllm.engine.request import RequestOutput
from fastllm.engine.runner import LOGITS_ROWS, Runner
from fastllm.engine.scheduler import Chunk, Scheduler
from fastllm.engine.sequence import Request, Sequence
from fastllm.errors import NumericalError
from fastllm.models.decoder import Decoder


class Engine:
    """A model with its cache, scheduler and captured steps. Safe to call from several threads."""

    def __init__(
        self, model: Decoder, cache: PagedCache, *, max_seqs: int, max_pages: int,
        max_batched_tokens: int, graphs: bool,
    ) -> None:  # fmt: skip
        self.model = model
        self.cache = cache
        self.scheduler = Scheduler(cache, max_seqs, max_batched_tokens)
        self.runner = Runner(model, cache, slots=max_seqs, max_pages=max_pages, graphs=graphs)
        self._lock = threading.RLock()

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests."""
        with self._lock:
            for request in requests:
                self.scheduler.add(request)

    def refresh(self) -> None:
        """Take note of changed weights, before a generation: see `Runner.refresh`."""
        with self._lock:
            self.runner.refresh()

    def step(self) -> None:
        """Advance everything that runs by one token, and prompts by one stretch."""
        with self._lock:
            for sequence in self.scheduler.admit():
                self._start(sequence)
            chunks = self.scheduler.next_chunks()
            if chunks:
                self._prefill(chunks)
            if self.scheduler.running:
                self._decode()

    def output(self, request: Request) -> RequestOutput:
        """The state of a request between two steps, whoever makes them."""
        with self._lock:
            return request.output()

    def abort(self, request: Request) -> None:
        """Stop a request, whatever state it is in, and free its slots and pages."""
        with self._lock:
            for sequence in [s for s in self.scheduler.running if s.request is request]:
                self._retire(sequence)
            self.scheduler.remove_queued(request)

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits of every position, float32 [len(ids), vocab]."""
        with self._lock:
            count = len(ids)
            pages = self.cache.allocate_for(count)
            rows = torch.empty(count, self.model.config.vocab_size, device=self.model.device)
            try:
                for start in range(0, count, self.scheduler.max_batched_tokens):
                    stop = min(start + self.scheduler.max_batched_tokens, count)
                    hidden = self.runner.prefill([ids[start:stop]], [start], [pages])
                    for at in range(start, stop, LOGITS_ROWS):
                        part = hidden[at - start : at - start + LOGITS_ROWS]
                        rows[at : at + part.shape[0]] = self.runner.logits(part)
            finally:
                self.cache.release(pages)
            return rows

    def _start(self, sequence: Sequence) -> None:
        """The prompt but for its last token is in the cache: decode from there."""
        request = sequence.request
        slot = self.scheduler.start(sequence)
        prompt = request.prompt_ids
        self.runner.set_slot(slot, prompt[-1], len(prompt) - 1, sequence.pages)
        banned: list[int] = []
        if request.params.min_tokens > 0:
            banned = sorted({*request.end_ids, *(request.params.stop_token_ids or ())})
        self.runner.sampler.set(slot, request.params, sequence.seed, prompt, banned)

    def _retire(self, sequence: Sequence) -> None:
        self.runner.free_slot(*self.scheduler.retire(sequence))

    def _prefill(self, chunks: list[Chunk]) -> None:
        hidden = self.runner.prefill(
            [c.sequence.request.prompt_ids[c.start : c.stop] for c in chunks],
            [c.start for c in chunks],
            [c.sequence.pages for c in chunks],
        )
        first = 0
        for chunk in chunks:
            rows = hidden[first : first + chunk.stop - chunk.start]
            first += chunk.stop - chunk.start
            if chunk.sequence.request.prompt_logprobs is not None:
                self._add_prompt_logprobs(chunk, rows)
        for sequence in self.scheduler.advance(chunks):
            self._start(sequence)

    def _add_prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> None:
        request = chunk.sequence.request
        count = request.params.prompt_logprobs
        assert count is not None and request.prompt_logprobs is not None
        for start in range(0, hidden.shape[0], LOGITS_ROWS):
            logits = self.runner.logits(hidden[start : start + LOGITS_ROWS])
            at = chunk.start + start + 1  # row i predicts token i + 1
            tokens = request.prompt_ids[at : at + logits.shape[0]]
            request.prompt_logprobs += logprob_rows(logits, tokens, count, request.tokenizer)

    def _decode(self) -> None:
        running = self.scheduler.running
        ids, logprobs, sampled = (a.tolist() for a in self.runner.decode(len(running)))
        wanted = any(s.logprobs is not None for s in running)
        logits = self.runner.last_logits(len(running)) if wanted else None
        ended = []
        for slot, sequence in enumerate(running):
            token = ids[slot]
            if token < 0:
                self._fail(sequence)
                ended.append(sequence)
                continue
            if logits is not None and sequence.logprobs is not None:
                count, tokenizer = sequence.request.params.logprobs or 0, sequence.request.tokenizer
                row = logits[slot : slot + 1]
                sequence.logprobs += logprob_rows(row, [token], count, tokenizer)
            sequence.append(token, logprobs[slot], sampled[slot])
            if sequence.finish_reason is not None:
                ended.append(sequence)
            elif len(sequence.token_ids) == sequence.request.params.min_tokens:
                self.runner.sampler.unban(slot)
        for sequence in ended:
            self._retire(sequence)

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
        sequence.finish_reason = "error"
