"""How well a tokenizer fits a text: bytes per token, script by script.

A token belongs to the script of its first character that is not a space. Japanese writes Chinese
characters between kana: in a document where kana are at least a tenth of both, both are Japanese.
Source code, as its file's name says, is a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fastllm.models.tokenizer import Tokenizer

# Unicode blocks, first and last code point. What is in none is punctuation, symbols or rarer.
_RANGES: dict[str, list[tuple[int, int]]] = {
    "Latin": [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F),
              (0x1E00, 0x1EFF)],
    "Greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "Cyrillic": [(0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)],
    "Hebrew": [(0x590, 0x5FF)],
    "Arabic": [(0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)],
    "Indic": [(0x900, 0xDFF)],
    "Thai, Lao": [(0xE00, 0xEFF)],
    "Korean": [(0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)],
    "Japanese": [(0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)],
    "Chinese": [(0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
                (0xF900, 0xFAFF), (0x20000, 0x3FFFF)],
    "digits": [(0x30, 0x39), (0xFF10, 0xFF19)],
    "space": [(0x9, 0xD), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x2000, 0x200A),
              (0x2028, 0x2029), (0x3000, 0x3000)],
}  # fmt: skip
OTHER, CODE = "punctuation, symbols", "code"
_NAMES = (*_RANGES, OTHER, CODE)
_SPACE, _CHINESE, _JAPANESE = map(_NAMES.index, ("space", "Chinese", "Japanese"))
_KANA_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class ScriptStats:
    """Of one script, or of all text."""

    script: str
    bytes: int
    characters: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """More is better: fewer tokens for the same text."""
        return self.bytes / self.tokens if self.tokens else 0.0


def tokenizer_stats(
    tokenizer: Tokenizer, texts: Iterable[tuple[str, bool]]
) -> tuple[list[ScriptStats], ScriptStats]:
    """Rows of the scripts that occur, most bytes first, and their sum.

    texts: (text, whether it is source code).
    """
    counts = np.zeros((3, len(_NAMES)), np.int64)
    for text, is_code in texts:
        ((_, offsets),) = tokenizer.encode_with_offsets([text])
        counts += _count(text, offsets, is_code)
    rows = [
        ScriptStats(name, *column) for name, column in zip(_NAMES, counts.T.tolist(), strict=True)
    ]
    rows = sorted((row for row in rows if row.tokens), key=lambda row: -row.bytes)
    return rows, ScriptStats("all", *counts.sum(axis=1).tolist())


def _count(text: str, offsets: list[tuple[int, int]], is_code: bool) -> NDArray[np.int64]:
    """[3, scripts] int64: bytes, characters, tokens of one text."""
    if not offsets:
        return np.zeros((3, len(_NAMES)), np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    scripts = _scripts_of(points)
    sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)  # bytes in UTF-8
    before = np.concatenate([[0], np.cumsum(sizes)])
    begin, end = np.array(offsets).T
    # Tokens that are parts of one character have its offsets: its bytes are counted at the first.
    done = np.maximum.accumulate(np.concatenate([[0], end[:-1]]))
    fresh = np.maximum(begin, done)
    seen = np.maximum(end, fresh)
    letter = np.minimum(begin + ((scripts[begin] == _SPACE) & (end > begin + 1)), len(points) - 1)
    owner = scripts[letter] if not is_code else np.full(len(begin), _NAMES.index(CODE))
    totals = [before[seen] - before[fresh], seen - fresh, np.ones(len(begin))]
    counted = [np.bincount(owner, weights, len(_NAMES)) for weights in totals]
    return np.array(counted).astype(np.int64)


def _scripts_of(points: NDArray[np.uint32]) -> NDArray[np.uint8]:
    scripts = _table()[points]
    kana = np.count_nonzero(scripts == _JAPANESE)
    if kana and kana >= _KANA_SHARE * (kana + np.count_nonzero(scripts == _CHINESE)):
        scripts[scripts == _CHINESE] = _JAPANESE
    return scripts


@cache
def _table() -> NDArray[np.uint8]:
    """The script of every code point."""
    table = np.full(0x110000, _NAMES.index(OTHER), np.uint8)
    for number, ranges in enumerate(_RANGES.values()):
        for first, last in ranges:
            table[first : last + 1] = number
    return table
