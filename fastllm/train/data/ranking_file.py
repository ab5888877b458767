"""Rankings that a person makes: what is typed, and the file that keeps it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllm.errors import DataError
from fastllm.train.locks import lock

_PLACE = re.compile(r"[=>,]|[^\s=>,]+")


def parse_order(text: str, count: int) -> list[int]:
    """Ranks from 1 of `count` answers, from their numbers in the order from best to worst.

    "2 1 = 4 3": the second is best, the first and the fourth are equal, the third is worst. Commas
    and ">" are blanks. Raises ValueError naming what is missing, unknown or there twice.
    """
    ranks: dict[int, int] = {}
    rank, tied = 0, False
    for word in _PLACE.findall(text):
        if word in (">", ","):
            continue
        if word == "=":
            if not ranks or tied:
                raise ValueError("'=' stands between two answers")
            tied = True
            continue
        if not (word.isascii() and word.isdigit()) or not 1 <= int(word[:9]) <= count:
            raise ValueError(f"{word!r} is no answer: they are numbered from 1 to {count}")
        number = int(word)
        if number in ranks:
            raise ValueError(f"answer {number} is there twice")
        rank += not tied
        tied = False
        ranks[number] = rank
    if tied:
        raise ValueError("'=' stands between two answers")
    missing = [str(n) for n in range(1, count + 1) if n not in ranks]
    if missing:
        raise ValueError(f"not ranked: {', '.join(missing)}")
    return [ranks[n] for n in range(1, count + 1)]


class RankingFile:
    """A .jsonl file of rankings that only grows; `done` knows the prompts that are in it.

    A last line that a kill has cut is dropped when the next one is written. Several processes may
    write to one file: each keeps what the others have added.
    Raises DataError if another line is no ranking.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._prompts: set[str] = set()
        self._whole = 0  # bytes of whole lines
        if path.exists():
            self._read()

    def _read(self) -> None:
        self.count = self._whole = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return
            self._whole += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                self._prompts.add(_key(record.get("prompt", record.get("messages"))))
            except (ValueError, AttributeError) as error:
                raise DataError(
                    self.path, f"line {number}", "", "is no ranking", "Name another file (--out)"
                ) from error
            self.count += 1

    def done(self, prompt: str | Sequence[Mapping[str, Any]]) -> bool:
        """Whether the prompt is ranked already."""
        return _key(prompt) in self._prompts

    def add(
        self, prompt: str | Sequence[Mapping[str, Any]], answers: Sequence[str],
        ranks: Sequence[int], **more: Any,
    ) -> None:  # fmt: skip
        """Append a ranking; once this returns it is on the disk. Raises OSError."""
        record = {"prompt": prompt, "answers": list(answers), "ranks": list(ranks), **more}
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            lock(file)
            self._read()
            file.truncate(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self._prompts.add(_key(prompt))
        self.count += 1


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)
