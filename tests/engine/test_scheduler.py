"""Admission, preemption, shared pages, slots, without a model: the books, and what pages hold."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many

import pytest
import torch

from fastllm.engine.cache import PAGE_SIZE, PagedCache, pages_for
from fastllm.engine.request import SamplingParams
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Request, Sequence, State
from fastllm.models.config import ModelConfig


def _cache(pages: int) -> PagedCache:
    config = ModelConfig(
        model_type="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=2, rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )  # fmt: skip
    return PagedCache(config, pages, torch.float32, torch.device("cpu"))


def _request(prompt: int | Many[int], tokens: int, n: int = 1, first: int = 0) -> Request:
    """Of a prompt, or of one of so many tokens that begins with `first`."""
    ids = [first, *range(1, prompt)] if isinstance(prompt, int) else list(prompt)
    return Request(
        request_id="r", prompt=None, prompt_ids=ids,
        params=SamplingParams(n=n, max_tokens=tokens, detokenize=False), seed=0,
        max_tokens=tokens, end_ids=frozenset(), tokenizer=None,
    )  # fmt: skip


class Books:
    """Steps a scheduler as the engine does, and checks after each step what must always hold.

    Instead of keys and values the pages hold a hash of the tokens that they depend on.
    """

    def __init__(self, pages: int, slots: int = 8, batched: int = 512, caching: bool = True):
        self.cache = _cache(pages)
        self.scheduler = Scheduler(self.cache, slots, batched, caching)
        self.ended: list[Sequence] = []
        self.computed = 0  # positions, of prompts and of preempted samples
        self.copies = 0
        self._contents = [[0] * PAGE_SIZE for _ in range(pages)]
        self._hashes: dict[Sequence, list[int]] = {}
        self.cache.copy_page = self._copy  # type: ignore[method-assign]

    def step(self) -> None:
        scheduler = self.scheduler
        self._start(scheduler.admit())
        chunks = scheduler.next_chunks()
        for chunk in chunks:
            self.computed += chunk.stop - chunk.start
            for position in range(chunk.start, chunk.stop):
                self._write(chunk.sequence, position)
        self._start(scheduler.advance(chunks))
        scheduler.grow()
        for sequence in list(scheduler.running):
            self._decode(sequence)
        self.check()

    def run(self, steps: int = 100_000) -> None:
        """Until there is nothing left to do."""
        while not self.scheduler.idle:
            self.step()
            steps -= 1
            assert steps, "it goes on for ever"

    def check(self) -> None:
        scheduler, pool = self.scheduler, self.cache.pool
        assert [s.slot for s in scheduler.running] == list(range(len(scheduler.running)))
        admitted = scheduler.running + scheduler.prefilling
        assert len(admitted) <= scheduler.max_seqs
        users = [0] * pool.num_pages
        for sequence in admitted:
            for page in sequence.pages:
                users[page] += 1
        assert users == [pool.users(page) for page in range(pool.num_pages)]
        assert pool.free_pages == users.count(0)
        assert scheduler._owed == sum(
            pages_for(len(s.request.prompt_ids) + s.request.max_tokens - 1) - len(s.pages)
            for s in admitted
        )

    def _start(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            self.scheduler.start(sequence)

    def _decode(self, sequence: Sequence) -> None:
        last = sequence.length - 1
        assert self.cache.pool.users(sequence.pages[last // PAGE_SIZE]) == 1, "writes into a shared"
        self._write(sequence, last)
        held = [entry for page in sequence.pages for entry in self._contents[page]]
        assert held[: last + 1] == self._of(sequence)[: last + 1], "reads what another one wrote"
        sequence.append((sequence.seed + len(sequence.token_ids)) % 3, 0.0, 0.0)
        if sequence.finish_reason is not None:
            self.scheduler.retire(sequence)
            self.ended.append(sequence)

    def _write(self, sequence: Sequence, position: int) -> None:
        page = sequence.pages[position // PAGE_SIZE]
        self._contents[page][position % PAGE_SIZE] = self._of(sequence)[position]

    def _of(self, sequence: Sequence) -> list[int]:
        known = self._hashes.setdefault(sequence, [])
        for token in sequence.ids(len(known), sequence.length):
            known.append(hash((known[-1] if known else 0, token)))
        return known

    def _copy(self, target: int, source: int) -> None:
        self.copies += 1
        self._contents[target] = list(self._contents[source])


def _order(books: Books) -> list[int]:
    return [sequence.request.arrival for sequence in books.ended]


def test_arrival_order_is_kept_when_pages_run_out() -> None:
    books = Books(pages=4)
    for prompt, tokens in ((1, 100), (3 * PAGE_SIZE, 5), (5, 2)):
        books.scheduler.add(_request(prompt, tokens, first=prompt))
    books.step()
    assert len(books.scheduler.running) == 1  # the second needs all pages; the third waits too
    books.run()
    assert _order(books) == [0, 1, 2]


def test_admission_asks_for_the_pages_needed_now() -> None:
    books = Books(pages=8)
    for i in range(4):
        books.scheduler.add(_request(10, 3 * PAGE_SIZE, first=i))  # 16 pages in the end
    books.step()
    assert len(books.scheduler.running) == 4
    books.run()
    assert books.scheduler.preemptions > 0
    assert [len(s.token_ids) for s in books.ended] == [3 * PAGE_SIZE] * 4
    assert _order(books) == [0, 1, 2, 3]  # the youngest give way


def test_samples_whose_pages_all_fit_run_together() -> None:
    books = Books(pages=16, slots=8)
    for i in range(8):
        books.scheduler.add(_request(60, 69, first=i))  # two pages in the end
    books.step()
    assert len(books.scheduler.running) == 8
    books.run()
    assert not books.scheduler.preemptions


def test_who_gives_way_keeps_its_tokens_and_goes_first_again() -> None:
    books = Books(pages=3)
    old, young, later = (_request(60, tokens, first=i) for i, tokens in enumerate((30, 30, 1)))
    for request in (old, young):
        books.scheduler.add(request)
    while not books.scheduler.preemptions:
        books.step()
    books.scheduler.add(later)
    given = list(young.samples[0].token_ids)
    assert young.samples[0].state is State.QUEUED and given and not young.samples[0].pages
    while young.samples[0].state is State.QUEUED:
        assert later.samples[0].state is State.QUEUED  # though it would fit
        books.step()
    books.run()
    assert young.samples[0].token_ids[: len(given)] == given
    assert len(young.samples[0].token_ids) == 30 and len(books.ended) == 3


def test_prompts_are_chunked_oldest_first() -> None:
    scheduler = Scheduler(_cache(64), max_seqs=8, max_batched_tokens=100)
    for first, prompt in enumerate((151, 31, 81)):
        scheduler.add(_request(prompt, 1, first=first))
    scheduler.admit()
    seen = []
    while scheduler.prefilling:
        chunks = scheduler.next_chunks()
        seen.append([(c.sequence.request.arrival, c.start, c.stop) for c in chunks])
        scheduler.advance(chunks)
    assert seen == [[(0, 0, 100)], [(0, 100, 150), (1, 0, 30), (2, 0, 20)], [(2, 20, 80)]]


def test_decoding_goes_on_between_the_chunks_of_a_long_prompt() -> None:
    books = Books(pages=64, batched=64)
    books.scheduler.add(_request(3, 40))
    books.scheduler.add(_request(20 * PAGE_SIZE, 1, first=7))
    for _ in range(20):
        books.step()
    assert len(books.scheduler.running[0].token_ids) == 20


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 2, 40, 64, 65, 128, 129, 500])
def test_samples_of_a_prompt_compute_it_once(length: int, caching: bool) -> None:
    books = Books(pages=128, batched=100, caching=caching)
    books.scheduler.add(_request(length, 70, n=5))
    books.run()
    assert books.computed == length - 1
    assert books.copies == (4 if (length - 1) % PAGE_SIZE else 0)  # a page that is partly filled
    assert len(books.ended) == 5


def test_requests_that_arrive_together_compute_what_they_share_once() -> None:
    books, common = Books(pages=64, batched=100), list(range(200))
    for tail in range(4):
        books.scheduler.add(_request([*common, *[tail] * 20], 5))
    books.run()
    assert books.computed == 219 + 3 * (219 - 192)  # 192: three full pages


def test_later_requests_find_pages_until_these_are_used_again() -> None:
    books = Books(pages=6)
    for first, expected in ((0, 200), (0, 0), (1, 200), (0, 200 - 128)):  # it took the last ones
        before = books.computed
        books.scheduler.add(_request(201, 3, first=first))
        books.run()
        assert books.computed - before == expected
    assert books.copies == 0  # nobody else used the last page: it was taken over


def test_answers_are_found_too() -> None:
    books = Books(pages=16)
    turn = _request(100, 120)
    books.scheduler.add(turn)
    books.run()
    books.computed = 0
    books.scheduler.add(_request([*turn.prompt_ids, *turn.samples[0].token_ids, 5], 1))
    books.run()
    assert books.computed == 220 - 192


def test_nothing_is_found_without_caching_or_after_a_clear() -> None:
    for caching in (False, True):
        books = Books(pages=16, caching=caching)
        for _ in range(2):
            books.scheduler.add(_request(150, 1))
            books.run()
            books.scheduler.prefix.clear()
        assert books.computed == 2 * 149
        assert books.cache.pool.kept_pages == 0


def test_what_a_clear_finds_in_progress_is_not_found_later() -> None:
    books = Books(pages=32, batched=100)
    books.scheduler.add(_request(190, 100))  # in the second chunk of its prompt
    books.step()
    books.scheduler.add(_request(30, 100, first=9))  # decoding
    books.step()
    books.scheduler.prefix.clear()
    books.run()
    books.computed = 0
    books.scheduler.add(_request(190, 1))
    books.scheduler.add(_request(30, 1, first=9))
    books.run()
    assert books.computed == 189 + 29


def test_pages_kept_without_a_user_are_limited() -> None:
    books = Books(pages=32)
    books.cache.pool.most_kept = 5
    for first in range(4):
        books.scheduler.add(_request(201, 1, first=first))
    books.run()
    assert books.cache.pool.kept_pages == 5 and books.cache.free_pages == 32


def test_prompt_logprobs_are_computed_whatever_is_cached() -> None:
    books = Books(pages=32)
    books.scheduler.add(_request(150, 1))
    books.run()
    request = _request(150, 1)
    request.prompt_logprobs = [None]
    books.scheduler.add(request)
    books.run()
    assert books.computed == 2 * 149


def test_a_follower_of_an_aborted_request_goes_on() -> None:
    books = Books(pages=32, batched=64)
    leader, follower = _request(300, 5, n=2), _request(300, 5)
    books.scheduler.add(leader)
    books.scheduler.add(follower)
    books.step()
    books.step()
    assert not books.scheduler.abort(leader)
    books.run()
    assert [s.request for s in books.ended] == [follower]


def test_a_long_queue_is_not_looked_at() -> None:
    books = Books(pages=64, slots=2)
    for first in range(5000):
        books.scheduler.add(_request(5, 10**6, first=first))
    books.step()
    waiting = list(books.scheduler._waiting)
    books.step()
    assert books.scheduler._waiting == waiting and len(waiting) == 4998


def _events(seed: int, events: int, pages: int, caching: bool) -> None:
    """Random adds, aborts, clears and steps; prompts begin alike, so that all is shared."""
    rng = random.Random(seed)
    batched = rng.choice((30, 64, 200))
    books = Books(pages, slots=rng.choice((1, 3, 6)), batched=batched, caching=caching)
    live: list[Request] = []
    longest = (pages - 1) * PAGE_SIZE
    for _ in range(events):
        kind = rng.random()
        if kind < 0.25 and len(live) < 30:
            length = min(rng.choice((1, 2, 63, 64, 65, 130, rng.randint(1, longest - 1))), longest)
            ids = [0] * length
            if rng.random() < 0.5:
                ids[rng.randrange(length) :] = [1] * (length - rng.randrange(length))
            tokens = rng.randint(1, min(longest + 1 - len(ids[:longest]), 100))
            live.append(_request(ids[:longest], tokens, n=rng.choice((1, 1, 2, 5))))
            books.scheduler.add(live[-1])
        elif kind < 0.3 and live:
            request = live.pop(rng.randrange(len(live)))
            books.scheduler.abort(request)
            books.check()
            assert all(sample.state is State.ENDED for sample in request.samples)
        elif kind < 0.305:
            books.scheduler.prefix.clear()
        else:
            books.step()
        live = [request for request in live if not request.finished]
    books.run()
    pool = books.cache.pool
    assert pool.free_pages == pool.num_pages
    assert all(pool.users(page) == 0 for page in range(pages))
    assert len(pool._blank) + pool.kept_pages == pages
    assert not books.scheduler.prefix._computing and not books.scheduler._waiting
    for sequence in books.ended:
        assert len(sequence.token_ids) == sequence.request.max_tokens


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_random_events_leak_no_page_and_mix_no_contents(seed: int, caching: bool) -> None:
    _events(seed, 150, pages=(5, 9, 30)[seed % 3], caching=caching)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8))
def test_ten_thousand_random_events_leak_no_page_and_mix_no_contents(seed: int) -> None:
    _events(100 + seed, 10_000, pages=(5, 9, 30, 60)[seed % 4], caching=seed % 3 != 0)


def test_pages_that_are_not_there_are_not_given() -> None:
    pool = _cache(4).pool
    pages = pool.allocate(3)
    pool.share(pages[:1])
    pool.release(pages)
    assert pool.free_pages == 3
    pool.release(pages[:1])
    assert pool.free_pages == 4 and pages_for(4 * PAGE_SIZE) == 4
    with pytest.raises(RuntimeError, match="5 pages"):
        pool.allocate(5)
