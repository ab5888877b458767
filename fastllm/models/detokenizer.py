"""Text of a growing answer: incremental decoding of token ids, and stop strings.

Invariant of both classes: what `push` returned so far plus what `flush` returns is the text that
decoding everything at once gives. Only text that no later token can change is let out, so a
character whose bytes are spread over tokens comes out whole, with its last token.
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

from fastllm.errors import ModelFileError

if TYPE_CHECKING:
    from fastllm.models.tokenizer import Tokenizer


class PieceDecoder(Protocol):
    """Turns token spellings, one by one, into text that is final."""

    def push(self, piece: str) -> str: ...
    def flush(self) -> str: ...


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: a printable Latin-1 character is itself, the
    others are numbered from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    table = {chr(byte): byte for byte in printable}
    table.update((chr(0x100 + i), byte) for i, byte in enumerate(others))
    return table


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class ByteLevelPieces:
    """Byte-level BPE: spellings are bytes in GPT-2's alphabet, the text is their UTF-8 reading.

    Python's incremental UTF-8 decoder replaces maximal invalid prefixes by U+FFFD as Rust's lossy
    conversion does, and keeps at most 3 bytes.
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, piece: str) -> str:
        try:
            data = bytes(map(_BYTE_OF.__getitem__, piece))
        except KeyError:  # an added token spelled in plain text
            data = piece.encode("utf-8")
        return self._decode(data)

    def flush(self) -> str:
        return self._decode(b"", True)


class SentencePieces:
    """SentencePiece spellings: "\u2581" is a space, <0xE4> a byte.

    A run of byte tokens is text if all of it is valid UTF-8 and else one U+FFFD for each byte. The
    verdict on a run falls at its end, so it is held back until then.
    """

    def __init__(self, replacements: Iterable[tuple[str, str]], strip: str, count: int) -> None:
        self._replacements = tuple(replacements)
        self._strip, self._to_strip = strip, count
        self._run = bytearray()

    def push(self, piece: str) -> str:
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(piece)
        if match:
            self._run.append(int(match[1], 16))
            return ""
        return self._stripped(self._end_run() + piece)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        """Drop the first characters of the whole answer that are to be stripped."""
        while self._to_strip and text:
            if not text.startswith(self._strip):
                self._to_strip = 0
                break
            text = text[len(self._strip) :]
            self._to_strip -= 1
        return text


def piece_decoder(
    config: Mapping[str, Any] | None, file: str | PathLike[str]
) -> Callable[[], PieceDecoder]:
    """A maker of decoders equal to the `decoder` of a tokenizer.json.

    Raises ModelFileError for decoders other than ByteLevel and the SentencePiece sequence
    (Replace..., ByteFallback, Fuse, optionally Strip at the start), which cover the decoders that
    causal language models use.
    """
    kind = None if config is None else config.get("type")
    if config is not None and kind == "ByteLevel":
        return ByteLevelPieces
    steps = list(config.get("decoders", ())) if config is not None and kind == "Sequence" else []
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevelPieces
    replacements = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    strip, count = " ", 0
    if len(steps) == 3 and steps[2]["type"] == "Strip" and steps[2]["stop"] == 0:
        step = steps.pop()
        strip, count = step["content"], step["start"]
    if [step["type"] for step in steps] != ["ByteFallback", "Fuse"]:
        raise ModelFileError(
            file,
            "decoder",
            f"{kind or 'none'} cannot be decoded incrementally",
            "Supported: ByteLevel, and Replace + ByteFallback + Fuse [+ Strip at the start]",
        )
    return lambda: SentencePieces(replacements, strip, count)


class Detokenizer:
    """One answer's text, token by token: O(length of the token) each.

    The deltas of `push` and the final `flush` add up to
    `tokenizer.decode(all ids, skip_special_tokens)`, for any ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._pieces = tokenizer.piece_decoder()

    def push(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes "".

        Raises ValueError for a negative id.
        """
        piece = self._tokenizer.piece(token_id, self._skip)
        return "" if piece is None else self._pieces.push(piece)

    def flush(self) -> str:
        """What was held back, once no token follows: an incomplete character is U+FFFD."""
        return self._pieces.flush()


class StopMatcher:
    """Cuts a stream of text at the first stop string, holding back what may become one.

    As in vLLM the text ends before the stop string (after it with `include_stop_str_in_output`)
    and the finish reason is "stop" with `matched` as stop reason. The first stop string to be
    complete wins; of several complete at the same character, the first of the list. So the result
    does not depend on how the text was split into deltas.

    An Aho-Corasick automaton over all stop strings: O(1) amortised per character. Its depth in a
    state is the length of the longest suffix of the text that begins a stop string: the part held.
    """

    def __init__(
        self, stops: str | Iterable[str], include_stop_str_in_output: bool = False
    ) -> None:
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self.stops:
            if not isinstance(stop, str):
                raise TypeError(f"stop must be strings, got {type(stop).__name__}")
            if not stop:
                raise ValueError("stop must not contain an empty string; remove it")
        self.include = include_stop_str_in_output
        self.matched: str | None = None
        self._held = ""
        self._state = 0
        self._build()

    def _build(self) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[int | None] = [None]  # index of the stop string that ends here
        for index, stop in enumerate(self.stops):
            state = 0
            for char in stop:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._depth.append(self._depth[state] + 1)
                    self._next.append({})
                    self._found.append(None)
                state = self._next[state][char]
            if self._found[state] is None:
                self._found[state] = index
        self._fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:  # breadth first: a failure link points to a shallower state
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = link = self._step(self._fail[state], char)
                ends = [i for i in (self._found[child], self._found[link]) if i is not None]
                self._found[child] = min(ends, default=None)
                queue.append(child)

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def push(self, text: str, check: bool = True) -> str:
        """Text that is now certain to be part of the answer; "" after a match.

        check=False: a stop string that ends within `text` does not count (min_tokens).
        """
        if self.matched is not None:
            return ""
        if len(self._next) == 1:  # no stop strings
            return text
        for i, char in enumerate(text):
            self._state = self._step(self._state, char)
            found = self._found[self._state]
            if check and found is not None:
                return self._finish(self.stops[found], self._held + text[: i + 1])
        whole = self._held + text
        cut = len(whole) - self._depth[self._state]
        self._held = whole[cut:]
        return whole[:cut]

    def _finish(self, stop: str, whole: str) -> str:
        self.matched, self._held = stop, ""
        return whole if self.include else whole[: len(whole) - len(stop)]

    def flush(self) -> str:
        """What was held back, once no text follows; "" after a match."""
        held, self._held, self._state = self._held, "", 0
        return held
