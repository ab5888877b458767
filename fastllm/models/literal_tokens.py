"""Texts that spell special tokens in some places only as characters.

A rendered conversation spells the template's special tokens, and a library that parses them cannot
tell "<|im_end|>" in an answer from the token that ends it. Here the ones that are meant stand aside
under names that the text does not hold, and whatever else is spelled is read as characters. All of
the text still goes through the tokenizer at once, so that ids are those of whole texts.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

import tokenizers

Spans = Sequence[tuple[int, int]]
_NAMES = range(0xF0000, 0xFFFFE)  # characters of private use, one of which marks names


class LiteralTokens:
    """Encodes with the vocabulary of `backend`, which is not changed."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        longest_first = sorted(filter(None, self._special), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._twins: dict[str, tuple[tokenizers.Tokenizer, dict[int | None, int]]] = {}

    def spelled(self, text: str, spans: Spans) -> bool:
        """Whether special tokens are spelled in a span of characters."""
        return any(self._pattern.search(text, start, end) for start, end in spans)

    def encode(self, text: str, spans: Spans) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, place of each in `text`). Within `spans`, in order, no special token is one."""
        mark = next(chr(code) for code in _NAMES if chr(code) not in text)
        twin, meant = self._twin(mark)
        parts: list[str] = []
        ends: list[int] = []  # of names, in the changed text
        shifts = [0]  # of places behind so many names
        done = length = 0
        for found in self._pattern.finditer(text):
            if any(start < found.end() and found.start() < end for start, end in spans):
                continue
            name = _name(mark, self._special[found.group()])
            parts += [text[done : found.start()], name]
            length += found.start() - done + len(name)
            done = found.end()
            ends.append(length)
            shifts.append(done - length)
        encoding = twin.encode("".join([*parts, text[done:]]), add_special_tokens=False)

        def place(at: int) -> int:
            return at + shifts[bisect_right(ends, at)]

        ids = [meant.get(i, i) for i in encoding.ids]
        return ids, [(place(start), place(end)) for start, end in encoding.offsets]

    def _twin(self, mark: str) -> tuple[tokenizers.Tokenizer, dict[int | None, int]]:
        """What reads special tokens as text, and their names as tokens; and what its ids of added
        tokens and names mean, since it counts them anew."""
        if mark not in self._twins:
            source, added = self._backend, self._backend.get_added_tokens_decoder()
            twin = tokenizers.Tokenizer(source.model)
            for part in ("normalizer", "pre_tokenizer", "decoder"):
                value = getattr(source, part)
                if value is not None:
                    setattr(twin, part, value)
            twin.add_tokens([added[i] for i in sorted(added)])
            twin.add_tokens([_named(added[i], mark, i) for i in self._special.values()])
            twin.encode_special_tokens = True
            meant = {twin.token_to_id(token.content): i for i, token in added.items()}
            meant |= {twin.token_to_id(_name(mark, i)): i for i in self._special.values()}
            self._twins[mark] = twin, meant
        return self._twins[mark]


def _name(mark: str, token_id: int) -> str:
    return f"{mark}{token_id}{mark}"


def _named(token: tokenizers.AddedToken, mark: str, token_id: int) -> tokenizers.AddedToken:
    """A token that is found as the special one is, under its name."""
    return tokenizers.AddedToken(
        _name(mark, token_id), single_word=token.single_word, lstrip=token.lstrip,
        rstrip=token.rstrip, normalized=False, special=False,
    )  # fmt: skip
