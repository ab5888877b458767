"""Finds the pages that hold the beginning of a sequence, whoever has computed them.

A page is named by a SHA-256 of its token ids and of the page before it, so of everything that its
keys and values depend on. A name is given as soon as a sample is admitted that will compute the
page: who wants it too waits for that sample instead of computing it again. The page that a prompt
fills in part is found by the ids in it, and copied: its positions behind the prompt belong to the
answer of whoever wrote it.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import sha256

from fastllm.engine.page_pool import PagePool
from fastllm.engine.sequence import Request, Sequence
from fastllm.ops.paged_cache import PAGE_SIZE

_ROOT = b"\0" * 32


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache has of a sequence: full pages from its start, then a page whose first
    positions are the rest of it; or who is computing the page after the full ones."""

    pages: list[int]
    rest: int | None = None
    leader: Sequence | None = None


class PrefixCache:
    """Names of pages. shared: among all requests; otherwise among the samples of one."""

    def __init__(self, pool: PagePool, shared: bool = True) -> None:
        self.pool = pool
        self.shared = shared
        self._computing: dict[int, Sequence] = {}  # named pages that are not complete yet
        self._epoch = 0

    def match(self, sequence: Sequence) -> Match:
        """What the cache has of a sequence that is to be admitted.

        Never its last token, which the decode step takes, nor what prompt_logprobs needs computed.
        """
        limit = sequence.reusable
        pages: list[int] = []
        for name in self._names(sequence, limit // PAGE_SIZE):
            page = self.pool.find(name)
            if page is None:
                return Match(pages)
            if page in self._computing:
                return Match(pages, leader=self._computing[page])
            pages.append(page)
        if limit % PAGE_SIZE and limit == sequence.length - 1:
            rest = self.pool.find(self._rest_name(sequence))
            if rest is not None:
                return Match(pages, rest, self._computing.get(rest))
        return Match(pages)

    def take_over(self, sequence: Sequence, page: int) -> None:
        """A page without a user that holds a sequence's rest is given to it, and will be written
        behind it: whatever else it holds is lost."""
        self.pool.unname(page, but=self._rest_name(sequence))

    def announce(self, sequence: Sequence) -> None:
        """Name the pages that an admitted sequence is going to compute, behind `prefilled`."""
        sequence.epoch = self._epoch
        full, rest = divmod(sequence.length - 1, PAGE_SIZE)
        names = self._names(sequence, full)
        if rest and sequence.prefilled < sequence.length - 1:
            names = [*names, self._rest_name(sequence)]
        first = sequence.prefilled // PAGE_SIZE
        for page, name in zip(sequence.pages[first:], names[first:], strict=False):
            if self.pool.name(page, name):
                self._computing[page] = sequence

    def computed(self, sequence: Sequence, start: int, stop: int) -> None:
        """Positions start to stop - 1 of an announced sequence have been written."""
        end = stop // PAGE_SIZE + (stop == sequence.length - 1)
        for page in sequence.pages[start // PAGE_SIZE : end]:
            if self._computing.get(page) is sequence:
                del self._computing[page]

    def withdraw(self, sequence: Sequence) -> None:
        """A sequence gives up: the pages that it has not completed are what nobody waits for."""
        for page in sequence.pages:
            if self._computing.get(page) is sequence:
                del self._computing[page]
                self.pool.unname(page)

    def filled(self, sequence: Sequence) -> None:
        """A running sample has written the last position of its last page: name it."""
        if sequence.epoch == self._epoch:
            names = self._names(sequence, len(sequence.pages))
            self.pool.name(sequence.pages[-1], names[-1])

    def clear(self) -> None:
        """Forget every name, and those that were to come from samples in progress: the weights that
        their pages were made with are gone."""
        self._epoch += 1
        self._computing.clear()
        self.pool.forget()

    def _names(self, sequence: Sequence, count: int) -> list[bytes]:
        """Names of a sequence's first `count` pages."""
        names = sequence.page_names
        while len(names) < count:
            before = names[-1] if names else self._root(sequence.request)
            start = len(names) * PAGE_SIZE
            names.append(_name(before, sequence.ids(start, start + PAGE_SIZE)))
        return names[:count]

    def _rest_name(self, sequence: Sequence) -> bytes:
        """Name of the page that a sequence, its last token aside, fills in part."""
        stop = sequence.length - 1
        names = self._names(sequence, stop // PAGE_SIZE)
        before = names[-1] if names else self._root(sequence.request)
        return _name(before, sequence.ids(stop // PAGE_SIZE * PAGE_SIZE, stop))

    def _root(self, request: Request) -> bytes:
        return _ROOT if self.shared else request.arrival.to_bytes(32, "little", signed=True)


def _name(before: bytes, ids: list[int]) -> bytes:
    return sha256(before + array("i", ids).tobytes()).digest()
