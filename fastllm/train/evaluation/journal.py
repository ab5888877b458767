"""What is finished of an evaluation, one JSON object a line: a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastllm.errors import DataError
from fastllm.train.locks import lock


class Journal:
    """Records of finished problems by key, in a file that only grows.

    A last line that a kill has cut is dropped. Records of other models and settings may lie in the
    same file: their keys differ.

    Args:
        path: of the file; None keeps nothing.

    Raises:
        DataError: if a line before the last is no record.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None
        self._whole = 0  # bytes of whole lines
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                self.done[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    path, f"line {number}", "", "is not what an evaluation has written",
                    "Move the file away, or name another with --json",
                ) from error  # fmt: skip
            self._whole += len(line)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, `add` writes to the file. Raises BlockingIOError if another process does."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            lock(file, "another evaluation is writing it; name another file (--json)", self.path)
            file.truncate(self._whole)
            self._file = file
            try:
                yield
            finally:
                self._file = None

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record; its "key" says which. Once this returns, a kill does not lose it."""
        self.done[record["key"]] = record
        if self._file is not None:
            line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            self._file.write(line)
            self._file.flush()
            self._whole += len(line)


def keys_of(settings: Any, problems: Sequence[Any]) -> list[str]:
    """A key for each problem: of the settings, what is asked, and how often it was asked before.

    Both are JSON values.
    """
    base = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    seen: dict[str, int] = {}
    keys = []
    for problem in problems:
        text = json.dumps(problem)
        seen[text] = seen.get(text, -1) + 1
        own = base.copy()
        own.update(f"\n{seen[text]}\n{text}".encode())
        keys.append(own.hexdigest()[:32])
    return keys


def files_state(path: str | os.PathLike[str] | None) -> list[Any]:
    """What tells a model's files from changed ones: names, sizes and times of change."""
    if path is None:
        return []
    root = Path(path)
    files = sorted(file for file in root.iterdir() if file.is_file()) if root.is_dir() else [root]
    state = [(file, file.stat()) for file in files]
    return [str(root.resolve()), *([f.name, s.st_size, s.st_mtime_ns] for f, s in state)]
