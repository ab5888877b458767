"""What is done with each document, in this process or in several: rules, hashes, tokens.

This module and what it imports load no torch, so that a new process starts in a fifth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from .dedup import digest, signatures
from .filters import Filters
from .sources import Document

BATCH_CHARS = 1 << 19
_PIECE_CHARS = 1 << 18  # of a long text: the library's memory is some hundred bytes a character


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a process needs to know. The tokenizer travels as JSON."""

    tokenizer: str
    end_token_id: int
    dtype: str  # of the tokens
    filters: Filters | None
    signatures: bool


@dataclass(frozen=True, slots=True)
class Processed:
    """A batch of documents; the arrays are of those that passed the rules."""

    reasons: list[str | None]  # per document: the rule that it breaks
    tokens: NDArray[np.unsignedinteger]  # end to end, each document's end token included
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    digests: bytes
    signatures: NDArray[np.uint32] | None


class Worker:
    """Processes batches by a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._backend: Any = tokenizers.Tokenizer.from_str(recipe.tokenizer)
        self._backend.no_padding()
        self._backend.no_truncation()
        # Control tokens that a text spells are text: a document cannot end another.
        self._backend.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> Processed:
        """Rules, digests, signatures and tokens of `texts`."""
        recipe = self.recipe
        reasons = [_reason(recipe.filters, text) for text in texts]
        kept = [text for text, reason in zip(texts, reasons, strict=True) if reason is None]
        tokens, lengths = self._encode(kept)
        return Processed(
            reasons=reasons,
            tokens=tokens,
            lengths=lengths,
            text_bytes=np.array([len(text.encode()) for text in kept], np.int64),
            digests=b"".join(map(digest, kept)),
            signatures=signatures(kept) if recipe.signatures else None,
        )

    def _encode(self, texts: list[str]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        pieces = [pieces_of(text) for text in texts]
        encoded = self._backend.encode_batch_fast(
            list(chain.from_iterable(pieces)), add_special_tokens=False
        )
        rows = iter(encoded)
        end = np.array([self.recipe.end_token_id])
        parts = [
            np.concatenate([*(np.array(next(rows).ids, np.int64) for _ in own), end])
            for own in pieces
        ]
        lengths = np.array([len(part) for part in parts], np.int64)
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return tokens.astype(self.recipe.dtype), lengths


def _reason(filters: Filters | None, text: str) -> str | None:
    if filters is not None:
        return filters.reason(text)
    return None if text and not text.isspace() else "empty"


def pieces_of(text: str) -> list[str]:
    """A long text in pieces that end with a line whose next one begins with no space.

    Pre-tokenizers that end a token at a line's end, as those of byte-level BPE models do, give the
    tokens of the whole text.
    """
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARS:
        cut = text.find("\n", start + _PIECE_CHARS) + 1
        while 0 < cut < len(text) and text[cut].isspace():
            cut = text.find("\n", cut) + 1
        if not 0 < cut < len(text):
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in runs of about half a million characters, each long enough to be worth a trip
    to another process."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 64
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def process(
    documents: Iterable[Document], recipe: Recipe, processes: int
) -> Iterator[tuple[list[Document], Processed]]:
    """Batches and their results, in the order of the documents whatever `processes` is.

    With one process the tokenizer uses all cores by threads; others are started by spawn.
    Raises RuntimeError if a process ends early.
    """
    if processes == 1:
        worker = Worker(recipe)
        for batch in batches(documents):
            yield batch, worker([document.text for document in batch])
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(recipe,)
    )
    waiting: deque[tuple[list[Document], Future[Processed]]] = deque()
    try:
        for batch in batches(documents):
            waiting.append((batch, pool.submit(_work, [document.text for document in batch])))
            if len(waiting) > 2 * processes:  # bounds memory; a process never waits for the reader
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that tokenizes ended early: out of memory, or killed, or the script that "
            "called prepare() lacks `if __name__ == '__main__':` around the call. "
            "processes=1 works without processes"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(batch: list[Document], future: Future[Processed]) -> tuple[list[Document], Processed]:
    return batch, future.result()


_worker: Worker | None = None  # of a started process


def _start(recipe: Recipe) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by the other processes
    _worker = Worker(recipe)


def _work(texts: Sequence[str]) -> Processed:
    assert _worker is not None
    return _worker(texts)
