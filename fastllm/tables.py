"""Tables of plain text, for whatever prints one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest


def plain_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    width: int | None = None,
) -> list[str]:
    """The lines of an aligned table under a line of its columns' names.

    right: columns that are right-aligned. width: of a line, beyond which cells are wrapped. Raises
    ValueError if a row has more or fewer cells.
    """
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    if width is not None:
        widths = _shared(widths, width - 2 * (len(widths) - 1))
        wrapped = [list(map(textwrap.wrap, line, widths)) for line in lines]
        lines = [line for cells in wrapped for line in zip_longest(*cells, fillvalue="")]
    return [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]


def _shared(wanted: Sequence[int], total: int) -> list[int]:
    """Widths of columns within a total: narrow ones get theirs, wide ones share what is left."""
    given = list(wanted)
    for done, i in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        given[i] = max(min(wanted[i], total // (len(wanted) - done)), 1)
        total -= given[i]
    return given
