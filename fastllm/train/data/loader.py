"""Micro batches of a token store, in an order that nothing but the seed decides.

**Places.** A document of n stored tokens gives n places: at each the model reads the token before
(at the first, the store's start token) and predicts the stored one. So every stored token, the
first and the end-of-text one too, is a target exactly once in an epoch, and the loss summed over a
split, over its bytes of text, is exactly its nats per byte. A document longer than a row, and one
that is cut to fill a row, goes on elsewhere as if it were a document of its own: from position 0,
reading the last token before the cut and nothing earlier.

**Rows.** An epoch is a permutation of the split's documents, laid end to end and divided into
windows of `WINDOW_ROWS` rows. Inside a window `fill_rows` packs documents whole where it can: every
row holds exactly `seq_len` tokens but the epoch's last, which holds the rest. The rows of a window
are then shuffled. A window depends on (seed, epoch, window) alone, so any row can be found without
the ones before it, and the position of a run is one number.

**Steps.** Rows are numbered through all epochs; step s takes rows [s * rows_per_step, ...), also
across the end of an epoch. Rank r of w takes the r-th w-th part of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch import NO_LOSS, MicroBatch, micro_batch
from .order import permutation
from .packing import Span, fill_rows
from .store import TokenStore

__all__ = ["NO_LOSS", "Loader", "MicroBatch"]

WINDOW_ROWS = 256

ORDER = 1  # changes when the same seed would give other rows: older positions are then refused
_STATE = ("split", "seq_len", "seed", "data", "order")  # what a resumed run may not change


class Loader:
    """An endless iterator over optimizer steps; each is the list of this rank's micro batches."""

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        rows_per_step: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        micro_rows: int | None = None,
        split: str = "train",
    ) -> None:
        """
        seq_len: tokens of a row, and the longest stretch of a document that the model sees.
        rows_per_step: rows of an optimizer step, all ranks together; divisible by `world`.
        micro_rows: rows that go through the model at once (default: all of the rank's).
        Raises ValueError naming the argument, also for a split without tokens.
        """
        micro_rows = rows_per_step // world if micro_rows is None else micro_rows
        _check(seq_len=seq_len, rows_per_step=rows_per_step, world=world, micro_rows=micro_rows)
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
        if rows_per_step % world:
            raise ValueError(
                f"rows_per_step must be a multiple of the number of processes, so that all have "
                f"the same work: {rows_per_step} rows, {world} processes"
            )
        self.store = store
        self.seq_len = seq_len
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.rank = rank
        self.world = world
        self.micro_rows = micro_rows
        self.split = split
        self._epoch = Epoch(store, split, seq_len, seed, 0)
        self._row = 0  # rows of earlier steps, all ranks together

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold the whole split once."""
        return self._epoch.rows

    @property
    def epoch(self) -> float:
        """How often the split has been gone through, parts included."""
        return self._row / self.rows_per_epoch

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        share = self.rows_per_step // self.world
        first = self._row + self.rank * share
        rows = [self._row_at(number) for number in range(first, first + share)]
        self._row += self.rows_per_step
        return [
            self._batch(rows[low : low + self.micro_rows])
            for low in range(0, share, self.micro_rows)
        ]

    def evaluation(
        self, split: str = "holdout", *, max_rows: int | None = None
    ) -> Iterator[MicroBatch]:
        """This rank's part of one pass over a split, or over its first `max_rows` rows.

        The rows and their order do not depend on the loader's seed. Every rank gets the same number
        of micro batches, so that collectives meet: one that has no row left gets a batch of one
        place without a target.
        """
        epoch = Epoch(self.store, split, self.seq_len, 0, 0)
        total = epoch.rows if max_rows is None else min(max_rows, epoch.rows)
        stride = self.micro_rows * self.world
        for low in range(0, total, stride):
            first = low + self.rank * self.micro_rows
            last = min(first + self.micro_rows, total)
            rows = [epoch.row(number) for number in range(first, last)]
            yield self._batch(rows) if rows else _idle(self.store.start_token_id)

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, as JSON values: the next step's batches follow from it exactly.

        It does not hold world, rank, micro_rows and rows_per_step: they may change at a resume.
        """
        return {"row": self._row, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises ValueError naming what does not fit."""
        mine = self._identity()
        for name in _STATE:
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"the data position was saved with {name} {state.get(name)!r}, this run has "
                    f"{mine[name]!r}: the same rows cannot be found again. Resume with the saved "
                    "value, or start a new run from the saved weights"
                )
        row = state.get("row")
        if not isinstance(row, int) or isinstance(row, bool) or row < 0:
            raise ValueError(f"the data position's row is {row!r}, not a number of rows")
        self._row = row

    def _identity(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "data": self.store.fingerprint,
            "order": ORDER,
        }

    def _row_at(self, number: int) -> list[Span]:
        epoch, row = divmod(number, self.rows_per_epoch)
        if epoch != self._epoch.number:
            self._epoch = Epoch(self.store, self.split, self.seq_len, self.seed, epoch)
        return self._epoch.row(row)

    def _batch(self, rows: list[list[Span]]) -> MicroBatch:
        sources = np.array([span for row in rows for span in row], np.int64).reshape(-1, 3)
        return gather(self.store, sources)


class Epoch:
    """The rows of one pass over a split: 16 bytes a document, and one window of rows."""

    def __init__(self, store: TokenStore, split: str, seq_len: int, seed: int, number: int) -> None:
        part = store.split(split)
        if not part.tokens:
            raise ValueError(
                f"split {split!r} of {store.directory} holds no tokens; prepare it with more text"
                + (" or a larger --holdout" if split == "holdout" else "")
            )
        order = permutation(part.documents, seed, number)
        self.number = number
        self.rows = -(-part.tokens // seq_len)
        self._seq_len = seq_len
        self._key = (seed, number)
        self._documents = order + part.first
        self._ends = np.cumsum(store.lengths(split)[order])
        self._window: tuple[int, list[list[Span]]] = (-1, [])

    def row(self, number: int) -> list[Span]:
        """The pieces of a row."""
        window, row = divmod(number, WINDOW_ROWS)
        if self._window[0] != window:
            self._window = (window, self._pack(window))
        return self._window[1][row]

    def _pack(self, window: int) -> list[list[Span]]:
        low = window * WINDOW_ROWS * self._seq_len
        high = min(low + WINDOW_ROWS * self._seq_len, int(self._ends[-1]))
        first = int(np.searchsorted(self._ends, low, side="right"))
        last = int(np.searchsorted(self._ends, high, side="left"))
        ends = self._ends[first : last + 1]
        starts = np.concatenate([self._ends[first - 1 : first] if first else [0], ends[:-1]])
        cut = np.maximum(low - starts, 0)  # tokens of a document that an earlier window has
        lengths = np.minimum(ends, high) - starts - cut
        documents = self._documents[first : last + 1]
        spans = list(zip(documents.tolist(), cut.tolist(), lengths.tolist(), strict=True))
        rows = fill_rows(spans, self._seq_len)
        return [rows[i] for i in permutation(len(rows), *self._key, window)]


def gather(store: TokenStore, sources: NDArray[np.int64]) -> MicroBatch:
    """The micro batch of pieces of a store's documents.

    sources: [S, 3] int64: document, first token, number of tokens.
    """
    documents, starts, lengths = sources.T
    begins = store.offsets[documents].astype(np.int64) + starts  # in tokens.bin
    ends = np.cumsum(lengths)
    places = np.arange(int(ends[-1]), dtype=np.int64)
    places += np.repeat(begins - (ends - lengths), lengths)
    targets = store.tokens[places].astype(np.int64)
    before = store.tokens[np.maximum(places - 1, 0)].astype(np.int32)
    heads = (ends - lengths)[starts == 0]
    before[heads] = store.start_token_id
    return micro_batch(before, targets, lengths, sources)


def _idle(token: int) -> MicroBatch:
    """One place that trains nothing, for a rank that has no row."""
    ids, targets = np.array([token], np.int32), np.array([NO_LOSS], np.int64)
    return micro_batch(ids, targets, [1], np.array([[-1, 0, 1]], np.int64))


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
