"""Tables of plain text, for whatever prints one."""

from __future__ import annotations

from collections.abc import Sequence


def plain_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> list[str]:
    """The lines of an aligned table under a line of its columns' names.

    right: columns that are right-aligned. Raises ValueError if a row has more or fewer cells.
    """
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]
