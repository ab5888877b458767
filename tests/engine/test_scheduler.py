"""Pages, admission and slots, without a model."""

from __future__ import annotations

import random

import pytest
import torch

from fastllm.engine.cache import PAGE_SIZE, PagedCache, pages_for
from fastllm.engine.request import SamplingParams
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Request
from fastllm.models.config import ModelConfig


def _cache(pages: int) -> PagedCache:
    config = ModelConfig(
        model_type="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=2, rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )  # fmt: skip
    return PagedCache(config, pages, torch.float32, torch.device("cpu"))


def _request(name: str, prompt: int, tokens: int, n: int = 1) -> Request:
    params = SamplingParams(n=n, max_tokens=tokens, detokenize=False)
    return Request(
        request_id=name, prompt=None, prompt_ids=[0] * prompt, params=params, seed=0,
        max_tokens=tokens, end_ids=frozenset(), tokenizer=None,
    )  # fmt: skip


def test_pages_are_free_when_their_last_user_leaves() -> None:
    cache = _cache(4)
    pages = cache.allocate(3)
    cache.share(pages[:1])
    cache.release(pages)
    assert cache.free_pages == 3
    cache.release(pages[:1])
    assert cache.free_pages == 4
    with pytest.raises(RuntimeError, match="5 pages"):
        cache.allocate(5)


def test_arrival_order_is_kept_when_pages_run_out() -> None:
    scheduler = Scheduler(_cache(3), max_seqs=8, max_batched_tokens=512)
    big, small = _request("big", 2 * PAGE_SIZE, 65), _request("small", 5, 5)
    first = _request("first", 1, 2)
    for request in (first, big, small):
        scheduler.add(request)
    assert scheduler.admit() == first.samples  # big needs all pages, and small does not overtake it
    scheduler.start(first.samples[0])
    assert scheduler.admit() == [] and not scheduler.prefilling
    scheduler.retire(first.samples[0])
    scheduler.admit()
    assert scheduler.prefilling == big.samples


def test_prompts_are_chunked_oldest_first() -> None:
    scheduler = Scheduler(_cache(64), max_seqs=8, max_batched_tokens=100)
    for name, prompt in (("a", 151), ("b", 31), ("c", 81)):
        scheduler.add(_request(name, prompt, 1))
    scheduler.admit()
    seen = []
    while scheduler.prefilling:
        chunks = scheduler.next_chunks()
        seen.append([(c.sequence.request.request_id, c.start, c.stop) for c in chunks])
        scheduler.advance(chunks)
    assert seen == [
        [("a", 0, 100)],
        [("a", 100, 150), ("b", 0, 30), ("c", 0, 20)],
        [("c", 20, 80)],
    ]


def test_random_loads_leave_nothing_behind() -> None:
    """Admission, forks, ends and aborts in random order: slots stay dense, all pages come back."""
    rng = random.Random(3)
    cache = _cache(12)
    scheduler = Scheduler(cache, max_seqs=4, max_batched_tokens=64)
    requests, created, longest = [], 0, 5 * PAGE_SIZE
    while created < 200 or not scheduler.idle:
        if created < 200 and rng.random() < 0.5:
            prompt = rng.randint(1, longest - 1)
            tokens = rng.randint(1, longest - prompt)
            requests.append(_request(str(created), prompt, tokens, rng.choice((1, 1, 2, 5))))
            scheduler.add(requests[-1])
            created += 1
        for sequence in scheduler.admit():
            scheduler.start(sequence)
        for sequence in scheduler.advance(scheduler.next_chunks()):
            scheduler.start(sequence)
        assert [s.slot for s in scheduler.running] == list(range(len(scheduler.running)))
        assert len(scheduler.running) + len(scheduler.prefilling) <= 4
        for sequence in scheduler.running:
            request = sequence.request
            positions = len(request.prompt_ids) + request.max_tokens - 1
            assert len(sequence.pages) == pages_for(positions)
        if scheduler.running and rng.random() < 0.4:
            ended = rng.choice(scheduler.running)
            ended.finish_reason = "length"
            scheduler.retire(ended)
        if requests and rng.random() < 0.02:
            request = requests.pop(rng.randrange(len(requests)))
            for sequence in [s for s in scheduler.running if s.request is request]:
                scheduler.retire(sequence)
            scheduler.remove_queued(request)
    assert cache.free_pages == cache.num_pages


def test_requests_of_several_samples_never_wait_for_each_other() -> None:
    """Answers that fit into the prompt's last page give back nothing that a copy could use."""
    scheduler = Scheduler(_cache(4), max_seqs=8, max_batched_tokens=512)
    requests = [_request(name, PAGE_SIZE + 36, 5, n=3) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    for _ in range(20):
        for sequence in scheduler.admit():
            scheduler.start(sequence)
        for sequence in scheduler.advance(scheduler.next_chunks()):
            scheduler.start(sequence)
        for sequence in list(scheduler.running):
            scheduler.retire(sequence)
    assert scheduler.idle and scheduler.cache.free_pages == 4


def test_writable_pages_are_never_shared() -> None:
    cache = _cache(32)
    scheduler = Scheduler(cache, max_seqs=8, max_batched_tokens=1000)
    request = _request("r", PAGE_SIZE + 10, 80, n=4)
    scheduler.add(request)
    scheduler.admit()
    for sequence in scheduler.advance(scheduler.next_chunks()):
        scheduler.start(sequence)
    for sequence in scheduler.admit():
        scheduler.start(sequence)
    first = (len(request.prompt_ids) - 1) // PAGE_SIZE
    written = [set(s.pages[first:]) for s in scheduler.running]
    assert len(scheduler.running) == 4
    assert len(set.union(*written)) == sum(map(len, written))
    assert len({s.pages[0] for s in scheduler.running}) == 1
    assert request.shared_pages is None  # nobody is left to fork
