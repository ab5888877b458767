"""Which samples run: admission by free pages, chunks of prompts, slots of the decode batch.

Continuous batching. A sample waits, in the order of arrival, until a slot and all the pages that it
can ever need are free; so a running sample is never evicted. Its prompt enters the cache in chunks,
all but the last token, which the decode step takes: so that every token, the first one too, is
sampled in one place. Decoding goes on between the chunks of others. The samples running occupy
slots 0 to n - 1: when one ends, the last one moves into its slot.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fastllm.engine.cache import PAGE_SIZE, PagedCache, pages_for
from fastllm.engine.sequence import Request, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start to stop - 1 of a sample's prompt, to be written to its pages."""

    sequence: Sequence
    start: int
    stop: int


class Scheduler:
    """Pure bookkeeping: it never touches the model. `running[i]` is in slot i."""

    def __init__(self, cache: PagedCache, max_seqs: int, max_batched_tokens: int) -> None:
        self.cache = cache
        self.max_seqs = max_seqs
        self.max_batched_tokens = max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.prefilling or self.running)

    def add(self, request: Request) -> None:
        """Queue a request: its first sample now, the others once the prompt is in the cache."""
        self.waiting.append(request.samples[0])

    def admit(self) -> list[Sequence]:
        """Admit waiting samples, in order, while they fit; returned are those ready to decode."""
        ready: list[Sequence] = []
        slots = self.max_seqs - len(self.prefilling) - len(self.running)
        while self.waiting and slots > 0:
            sequence = self.waiting[0]
            request = sequence.request
            shared = _shared_pages(request)
            own = pages_for(len(request.prompt_ids) + request.max_tokens - 1) - len(shared)
            spare = _spare_pages(sequence)
            if own + spare > self.cache.free_pages + len(request.spare_pages):
                break
            slots -= 1
            self.waiting.popleft()
            self.cache.release(request.spare_pages)
            request.spare_pages = self.cache.allocate(spare)
            self.cache.share(shared)
            sequence.pages = shared + self.cache.allocate(own)
            if request.shared_pages is not None:
                self._fork(sequence, request.shared_pages, len(shared))
            if sequence.prefilled == len(request.prompt_ids) - 1:
                self._prompt_done(sequence)
                ready.append(sequence)
            else:
                self.prefilling.append(sequence)
        return ready

    def _fork(self, sequence: Sequence, source: list[int], full: int) -> None:
        """Give a further sample the prompt's K and V. A page that the prompt fills in part is
        copied; what its first user wrote behind the prompt is overwritten before it is read."""
        if len(source) > full:
            self.cache.copy_page(sequence.pages[full], source[full])
        sequence.prefilled = len(sequence.request.prompt_ids) - 1

    def next_chunks(self) -> list[Chunk]:
        """The next stretch of prompts, oldest first, at most `max_batched_tokens` tokens."""
        chunks, budget = [], self.max_batched_tokens
        for sequence in self.prefilling:
            if budget == 0:
                break
            left = len(sequence.request.prompt_ids) - 1 - sequence.prefilled
            count = min(left, budget)
            start = sequence.prefilled
            chunks.append(Chunk(sequence, start, start + count))
            budget -= count
        return chunks

    def advance(self, chunks: list[Chunk]) -> list[Sequence]:
        """Note that chunks are in the cache; returns the samples whose prompt is complete."""
        done = []
        for chunk in chunks:
            chunk.sequence.prefilled = chunk.stop
            if chunk.stop == len(chunk.sequence.request.prompt_ids) - 1:
                self.prefilling.remove(chunk.sequence)
                self._prompt_done(chunk.sequence)
                done.append(chunk.sequence)
        return done

    def _prompt_done(self, sequence: Sequence) -> None:
        request = sequence.request
        if sequence.index == 0 and len(request.samples) > 1:
            request.shared_pages = sequence.pages[: pages_for(len(request.prompt_ids) - 1)]
            self.cache.share(request.shared_pages)
            self.waiting.extendleft(reversed(request.samples[1:]))
        elif sequence.index == len(request.samples) - 1:
            self._drop_shared(request)

    def _drop_shared(self, request: Request) -> None:
        if request.shared_pages is not None:
            self.cache.release(request.shared_pages)
            request.shared_pages = None
        self.cache.release(request.spare_pages)
        request.spare_pages = []

    def start(self, sequence: Sequence) -> int:
        """Put a sample into the first free slot, and return it."""
        sequence.slot = len(self.running)
        self.running.append(sequence)
        return sequence.slot

    def retire(self, sequence: Sequence) -> tuple[int, int]:
        """Take a running sample out; returns (hole, last): slot `last` is to move into `hole`."""
        hole, last = sequence.slot, len(self.running) - 1
        moved = self.running.pop()
        if moved is not sequence:
            self.running[hole] = moved
            moved.slot = hole
        sequence.slot = -1
        self.free(sequence)
        return hole, last

    def free(self, sequence: Sequence) -> None:
        """Give a sample's pages back."""
        self.cache.release(sequence.pages)
        sequence.pages = []

    def remove_queued(self, request: Request) -> None:
        """Forget a request's samples that do not run yet, and the pages that it keeps for them."""
        self.waiting = deque(s for s in self.waiting if s.request is not request)
        for sequence in [s for s in self.prefilling if s.request is request]:
            self.prefilling.remove(sequence)
            self.free(sequence)
        self._drop_shared(request)


def _shared_pages(request: Request) -> list[int]:
    """Pages that the prompt fills, without its last token, if they are in the cache already."""
    if request.shared_pages is None:
        return []
    return request.shared_pages[: (len(request.prompt_ids) - 1) // PAGE_SIZE]


def _spare_pages(sequence: Sequence) -> int:
    """Pages to hold back, with a request's first sample, for its second one.

    A page that the prompt fills in part is copied for each sample, and the request keeps the
    original: a sample that ends gives back one page less than the next one needs. Without this page
    requests with n > 1 could fill the cache and wait for each other for ever.
    """
    request = sequence.request
    first_of_many = sequence.index == 0 and len(request.samples) > 1
    return int(first_of_many and (len(request.prompt_ids) - 1) % PAGE_SIZE != 0)
