"""Rules that tell text from what only looks like it. Each has a name, under which it is counted.

The measures are those of Gopher (Rae et al., 2021, table A1) and C4 (Raffel et al., 2020), with
limits wide enough that prose of any script and source code pass: they drop tables of characters,
encoded data, pages of one repeated line. Quality in a narrower sense is a choice of sources.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# Punctuation and symbols; marks of Indic and Southeast Asian scripts, which \w leaves out, are not.
_SYMBOL = re.compile(
    r"[!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7"
    r"\u2010-\u2bff\u3000-\u3004\u3008-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40]"
)
_GARBLED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """The rules' limits. A share is of all characters, from 0 to 1."""

    min_chars: int = 8  # "short": fewer characters that are not space
    max_garbled: float = 0.01  # "garbled": share of control and replacement characters
    max_symbols: float = 0.4  # "symbols": share of punctuation and symbols
    max_word_length: float = 20.0  # "long words": mean length, where the text is mostly ASCII
    max_repeated_lines: float = 0.4  # "repeated lines": share in lines that occurred before
    max_repeated_words: float = 0.4  # "repeated words": share of the most frequent word

    def __post_init__(self) -> None:
        """Raises ValueError naming a limit that cannot be meant."""
        for name in ("max_garbled", "max_symbols", "max_repeated_lines", "max_repeated_words"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.min_chars < 0 or self.max_word_length <= 0:
            raise ValueError("min_chars must not be negative, max_word_length must be positive")

    def reason(self, text: str) -> str | None:
        """The name of the first rule that `text` breaks; None: it passes."""
        words = text.split()
        solid = sum(map(len, words))  # characters that are not space
        if solid < max(self.min_chars, 1):
            return "short"
        if len(_GARBLED.findall(text)) > self.max_garbled * len(text):
            return "garbled"
        if len(_SYMBOL.findall(text)) > self.max_symbols * solid:
            return "symbols"
        # Chinese, Japanese and Thai write no spaces: their words cannot be counted so.
        spaced = text.isascii() or len(text.encode()) < 1.2 * len(text)
        if spaced and solid > self.max_word_length * len(words):
            return "long words"
        if _repeated_lines(text) > self.max_repeated_lines * solid:
            return "repeated lines"
        if spaced and len(words) >= 50:
            word, count = Counter(words).most_common(1)[0]
            if count * len(word) > self.max_repeated_words * solid:
                return "repeated words"
        return None


def _repeated_lines(text: str) -> int:
    """Characters in lines that occurred before in the text."""
    lines = [line.strip() for line in text.splitlines()]
    if len(set(lines)) == len(lines):
        return 0
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        repeated += len("".join(line.split())) if line in seen else 0
        seen.add(line)
    return repeated
