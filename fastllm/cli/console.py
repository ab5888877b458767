"""Output: rich tables in a terminal, aligned plain lines anywhere else."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..tables import plain_table

if TYPE_CHECKING:
    from rich.console import Console

PERIOD = 10.0  # seconds between lines of progress


@functools.cache
def console() -> Console:
    """The console of stdout."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def heading(text: str) -> None:
    """A section's title."""
    if console().is_terminal:
        console().print(f"\n[bold]{text}[/bold]")
    else:
        print(f"\n{text}")


def facts(pairs: Sequence[tuple[str, object]]) -> None:
    """Names and values, one pair a line, aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"  {name:{width}}  {value}")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    right: Sequence[str] = (),
    width: int | None = None,
) -> None:
    """A table; columns named in `right` are right-aligned. Plain text when not in a terminal.

    width: of plain lines, beyond which cells are wrapped; None: they are as long as they are.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if not console().is_terminal:
        for line in plain_table(columns, cells, right, width):
            print(line)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        drawn.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    console().print(drawn)


def note(text: str) -> None:
    """A line beside the output proper, on stderr."""
    print(text, file=sys.stderr, flush=True)


def paced_note(clock: Callable[[], float] = time.monotonic) -> Callable[[str], None]:
    """A `note` for progress where no bar can be drawn.

    It says one line in `PERIOD` seconds of `clock`, the first after as long, and no others.
    """
    last = clock()

    def say(text: str) -> None:
        nonlocal last
        now = clock()
        if now - last >= PERIOD:
            last = now
            note(text)

    return say


@contextmanager
def progress_bar(total: int, label: str, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """Draws progress on stderr: a bar in a terminal, else a line every 10 seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        say = paced_note()
        yield lambda done: say(f"{label}: {done:,} of {total:,} {unit}")
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:,}}/{{task.total:,}} {unit}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


def human_bytes(count: float) -> str:
    """`98.1 MB`: powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
