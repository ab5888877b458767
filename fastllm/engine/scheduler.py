"""Who runs next: waiting samples, pages, chunks of prompts, slots of the decode batch.

Continuous batching. Samples are admitted in the order of arrival, when there are a slot and the
pages that they need now. What a sample has in common with others is not computed again: pages come
from the prefix cache, or the sample follows the one that is computing them. The rest of its prompt
enters the cache in chunks, all but the last token, which the decode step takes: so that every
token, the first one too, is sampled in one place. Decoding goes on between the chunks of others.

A running sample that needs a page when none is free takes it from the youngest one, which goes back
to the queue with its tokens and is prefilled again later, bit for bit: the oldest always get on.
The samples running occupy slots 0 to n - 1: when one leaves, the last one moves into its slot.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from fastllm.engine.cache import PAGE_SIZE, PagedCache, pages_for
from fastllm.engine.prefix_cache import Match, PrefixCache
from fastllm.engine.sequence import Request, Sequence, State

Move = tuple[int, int]  # (hole, last): what is in slot `last` is to move into `hole`


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start to stop - 1 of a sample, to be computed and written to its pages."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def ids(self) -> list[int]:
        """Their tokens."""
        return self.sequence.ids(self.start, self.stop)


@dataclass(slots=True)
class Growth:
    """Before a step: slots to move, for samples that gave way, then samples with a new page."""

    moves: list[Move] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Pure bookkeeping: it never touches the model. `running[i]` is in slot i."""

    def __init__(
        self, cache: PagedCache, max_seqs: int, max_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:  # fmt: skip
        self.cache = cache
        self.prefix = PrefixCache(cache.pool, prefix_caching)
        self.max_seqs = max_seqs
        self.max_batched_tokens = max_batched_tokens
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0  # so far
        self._waiting: list[tuple[int, int, Sequence]] = []  # a heap by age; the aborted stay in it
        self._queued = 0  # samples that wait, followers included
        self._owed = 0  # pages that the admitted may come to need besides theirs
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._queued or self.prefilling or self.running)

    def add(self, request: Request) -> None:
        """Queue a request: its first sample now, the others follow it."""
        request.arrival = self._arrivals
        self._arrivals += 1
        self._queued += len(request.samples)
        first, *others = request.samples
        for sequence in others:
            sequence.state = State.QUEUED
        first.followers = others
        self._push(first)

    # Admission

    def admit(self) -> list[Sequence]:
        """Admit waiting samples, in order, while they fit; returned are those ready to decode."""
        ready: list[Sequence] = []
        places = self.max_seqs - len(self.prefilling) - len(self.running)
        while places > 0 and (sequence := self._oldest_waiting()) is not None:
            match = self.prefix.match(sequence)
            if match.leader is not None:
                match.leader.followers.append(sequence)
            elif not self._give_pages(sequence, match, self.max_seqs - places):
                break
            heapq.heappop(self._waiting)
            places -= 1  # of a follower too: the work of a step does not grow with the queue
            if match.leader is not None:
                continue
            self._queued -= 1
            sequence.state = State.PREFILLING
            if sequence.prefilled == sequence.length - 1:
                self._release_followers(sequence)
                ready.append(sequence)
            else:
                self.prefilling.append(sequence)
        return ready

    def _push(self, sequence: Sequence) -> None:
        sequence.state = State.QUEUED
        heapq.heappush(self._waiting, (*sequence.age, sequence))

    def _oldest_waiting(self) -> Sequence | None:
        while self._waiting:
            sequence = self._waiting[0][-1]
            if sequence.state is State.QUEUED:
                return sequence
            heapq.heappop(self._waiting)
        return None

    def _give_pages(self, sequence: Sequence, match: Match, admitted: int) -> bool:
        """Give a sample the pages for its tokens, those of `match` among them, if they are there.

        A page for every two of the `admitted` samples stays free, unless they cannot ask for so
        many: a page lasts for 64 tokens, so that the newcomer does not have to give way before some
        32 steps.
        """
        pool, shared = self.cache.pool, match.pages
        taken_over = match.rest is not None and pool.users(match.rest) == 0
        if taken_over:
            assert match.rest is not None, "checked above"
            shared = [*shared, match.rest]
        needed = pages_for(sequence.length) - len(shared)
        free = pool.free_pages - sum(pool.users(page) == 0 for page in shared)
        if needed + min((admitted + 1) // 2, self._owed) > free:
            return False
        pool.share(shared)
        sequence.pages = shared + pool.allocate(needed)
        self._owed += _still_to_come(sequence)
        self._set_room(sequence)
        sequence.prefilled = len(match.pages) * PAGE_SIZE
        if match.rest is not None:
            sequence.prefilled = sequence.length - 1
            if taken_over:
                self.prefix.take_over(sequence, match.rest)
            else:
                self.cache.copy_page(sequence.pages[len(match.pages)], match.rest)
        self.prefix.announce(sequence)
        return True

    def _release_followers(self, sequence: Sequence, siblings: bool = True) -> None:
        """Queue the samples that waited for this one's pages. siblings: those of its request too,
        which want all that it computes."""
        followers, sequence.followers = sequence.followers, []
        for follower in followers:
            if not siblings and follower.request is sequence.request:
                sequence.followers.append(follower)
            elif follower.state is State.QUEUED:
                self._push(follower)

    @staticmethod
    def _set_room(sequence: Sequence) -> None:
        sequence.room = len(sequence.pages) * PAGE_SIZE - len(sequence.request.prompt_ids)

    # Prompts

    def next_chunks(self) -> list[Chunk]:
        """The next stretch of prompts, oldest first, at most `max_batched_tokens` tokens."""
        chunks, budget = [], self.max_batched_tokens
        for sequence in self.prefilling:
            if budget == 0:
                break
            start = sequence.prefilled
            count = min(sequence.length - 1 - start, budget)
            chunks.append(Chunk(sequence, start, start + count))
            budget -= count
        return chunks

    def advance(self, chunks: list[Chunk]) -> list[Sequence]:
        """Note that chunks are in the cache; returns the samples whose prompt is complete."""
        done = []
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.prefilled = chunk.stop
            self.prefix.computed(sequence, chunk.start, chunk.stop)
            complete = chunk.stop == sequence.length - 1
            self._release_followers(sequence, siblings=complete)
            if complete:
                self.prefilling.remove(sequence)
                done.append(sequence)
        return done

    # Running samples

    def start(self, sequence: Sequence) -> int:
        """Put a sample into the first free slot, and return it."""
        sequence.state = State.RUNNING
        sequence.slot = len(self.running)
        self.running.append(sequence)
        return sequence.slot

    def grow(self) -> Growth:
        """Give every running sample the page that its next token needs, if it needs one."""
        growth = Growth()
        short = [s for s in self.running if len(s.token_ids) > s.room]
        if not short:
            return growth
        pool = self.cache.pool
        for sequence in short:
            self.prefix.filled(sequence)
        for sequence in sorted(short, key=lambda s: s.age):
            while not pool.free_pages and sequence.state is State.RUNNING:
                youngest = max(self.running + self.prefilling, key=lambda s: s.age)
                growth.moves += self._preempt(youngest)
            if sequence.state is State.RUNNING:
                sequence.pages += pool.allocate(1)
                self._owed -= 1
                self._set_room(sequence)
                growth.grown.append(sequence)
        growth.grown = [s for s in growth.grown if s.state is State.RUNNING]
        return growth

    def _preempt(self, sequence: Sequence) -> list[Move]:
        """Send a sample back to the queue; returns the slots that are to move."""
        moves = self._leave(sequence)
        self._queued += 1
        self.preemptions += 1
        self._push(sequence)
        return moves

    def retire(self, sequence: Sequence) -> Move:
        """Take out a running sample that has ended."""
        (move,) = self._leave(sequence)
        sequence.state = State.ENDED
        return move

    def abort(self, request: Request) -> list[Move]:
        """Forget a request, whatever state its samples are in; returns the slots that are to move,
        in order."""
        moves: list[Move] = []
        for sequence in request.samples:
            if sequence.state in (State.RUNNING, State.PREFILLING):
                moves += self._leave(sequence)
            elif sequence.state is State.QUEUED:
                self._queued -= 1
            sequence.state = State.ENDED
        for sequence in request.samples:
            self._release_followers(sequence)
        return moves

    def _leave(self, sequence: Sequence) -> list[Move]:
        """Take away a running or prefilling sample's slot and pages."""
        moves = []
        if sequence.state is State.RUNNING:
            hole, last = sequence.slot, len(self.running) - 1
            moved = self.running.pop()
            if moved is not sequence:
                self.running[hole] = moved
                moved.slot = hole
            sequence.slot = -1
            moves.append((hole, last))
        else:
            if sequence in self.prefilling:  # not if a Ctrl-C has come between two steps of it
                self.prefilling.remove(sequence)
            self.prefix.withdraw(sequence)
            self._release_followers(sequence)
        self._owed -= _still_to_come(sequence)
        self.cache.pool.release(sequence.pages)
        sequence.pages = []
        return moves


def _still_to_come(sequence: Sequence) -> int:
    """Pages that an admitted sample may come to need besides those that it has."""
    positions = len(sequence.request.prompt_ids) + sequence.request.max_tokens - 1
    return pages_for(positions) - len(sequence.pages)
