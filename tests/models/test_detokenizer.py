"""Streaming: deltas add up to the final text, whatever the tokens, the text and the stops."""

from __future__ import annotations

import time
from functools import cache

import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from fastllm.errors import ModelFileError
from fastllm.models.detokenizer import StopMatcher, piece_decoder
from fastllm.models.tokenizer import Tokenizer

TEXT = "the cat sat on the mat 中文字符 你好 👩‍👩‍👧‍👦 🏳️‍🌈 é ½ don't 1234\n"
UNICODE = st.text(st.characters(exclude_categories=("Cs",)))


@cache
def byte_level() -> Tokenizer:
    """300 byte-level tokens, two control tokens, added tokens in and outside the byte alphabet."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens([AddedToken("a b"), AddedToken("é"), AddedToken("工具")])
    return Tokenizer(backend)


@cache
def sentence_piece() -> Tokenizer:
    """SentencePiece spellings: words, a space mark, all 256 byte tokens, a control token."""
    words = ["<unk>", "</s>", "▁", "▁the", "cat", "a", "中", "▁▁", "e", "t", "h", "<0x+F>"]
    names = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["</s>"])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_ids_stream_to_what_decode_gives(make: object, skip: bool, data: st.DataObject) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    words = st.integers(0, 12)  # where the small vocabulary has its words and control tokens
    token = st.one_of(words, st.integers(0, tokenizer.vocab_size + 3))  # some ids have no token
    ids = data.draw(st.lists(token, max_size=40))
    deltas = streamed(tokenizer, ids, skip)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.binary(max_size=40))
@example(b"\xed\xa0\x80\xed\xbf\xbf")  # surrogates
@example(b"\xf0\x9f\x98a\xf4\x90\x80\x80\xc0\xaf\xe4\xb8")
@settings(max_examples=500, deadline=None)
def test_any_bytes_stream_to_what_decode_gives(data: bytes) -> None:
    tokenizer = byte_level()
    alphabet = {v: k for k, v in _bytes_of_alphabet().items()}
    ids = [tokenizer.token_to_id(alphabet[byte]) for byte in data]
    deltas = streamed(tokenizer, ids)
    assert "".join(deltas) == tokenizer.decode(ids) == data.decode("utf-8", "replace")
    pieces = sentence_piece()
    ids = [pieces.token_to_id(f"<0x{byte:02X}>") for byte in data]
    assert "".join(streamed(pieces, ids)) == pieces.decode(ids)


@cache
def _bytes_of_alphabet() -> dict[str, int]:
    """From the library itself: how it spells each byte that UTF-8 text can hold."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    table: dict[str, int] = {}
    for point in [*range(0x800), *range(0x800, 0x110000, 0x3F)]:
        if not 0xD800 <= point < 0xE000:
            spelled = spell(chr(point))[0][0]
            table.update(zip(spelled, chr(point).encode("utf-8"), strict=True))
    unused = set(range(256)) - set(table.values())  # C0, C1, F5..FF are never in UTF-8
    table.update({chr(byte): byte for byte in unused})  # printable Latin-1 spells itself
    return table


@given(text=UNICODE)
@example("中文字符👩‍👩‍👧‍👦🏳️‍🌈é\u0301")
@settings(max_examples=200, deadline=None)
def test_valid_text_never_shows_half_a_character(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assume(tokenizer.decode(ids) == text)  # not so with the added token "é", a lone byte E9
    shown = ""
    for delta in streamed(tokenizer, ids):
        shown += delta
        assert text.startswith(shown)
    assert shown == text


def test_deltas_are_not_late() -> None:
    """Each character is out as soon as its last byte is."""
    tokenizer = byte_level()
    stream = tokenizer.detokenizer()
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    ids = [tokenizer.token_to_id(char) for char in spell("a中😀")[0][0]]
    assert [stream.push(i) for i in ids] == ["a", "", "", "中", "", "", "", "😀"]
    assert stream.push(ids[1]) == "" and stream.flush() == "\ufffd"


def test_time_per_token_does_not_grow() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(TEXT, parse_special=False) * 50

    def seconds(count: int) -> float:
        start = time.perf_counter()
        streamed(tokenizer, ids * count)
        return time.perf_counter() - start

    short = min(seconds(2) for _ in range(5))
    assert min(seconds(20) for _ in range(3)) < 40 * short  # quadratic would be 100 times


def test_negative_ids_and_unknown_decoders_are_errors() -> None:
    with pytest.raises(ValueError, match="negative"):
        byte_level().detokenizer().push(-1)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: decoder"):
        piece_decoder({"type": "CTC"}, "tokenizer.json")
    with pytest.raises(ModelFileError, match="none cannot be decoded"):
        piece_decoder(None, "tokenizer.json")


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: grow the text by characters; the first stop of the list that it ends with."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


LETTERS = st.text("abc中", max_size=25)


@pytest.mark.parametrize("include", [False, True])
@given(
    deltas=st.lists(LETTERS, max_size=8),
    stops=st.lists(st.text("abc中", min_size=1, max_size=6), max_size=4),
)
@example(deltas=["xa", "b", "c"], stops=["abc", "b"])
@example(deltas=["aab"], stops=["ab", "aab"])
@settings(max_examples=500, deadline=None)
def test_stops_cut_where_the_definition_says(
    include: bool, deltas: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops, include_stop_str_in_output=include)
    want, stop = expected("".join(deltas), stops, include)
    shown = ""
    for delta in deltas:
        shown += matcher.push(delta)
        assert want.startswith(shown)
    assert shown + matcher.flush() == want
    assert matcher.matched == stop


@given(text=UNICODE, cut=st.tuples(st.integers(0, 30), st.integers(1, 8)))
@settings(max_examples=200, deadline=None)
def test_stops_split_over_tokens(text: str, cut: tuple[int, int]) -> None:
    """Tokens, detokenizer and matcher together; the stop is a random slice of the text."""
    tokenizer = byte_level()
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    text = tokenizer.decode(ids)
    stop = text[cut[0] : sum(cut)] or "absent"
    stream, matcher = tokenizer.detokenizer(), StopMatcher(stop)
    shown = "".join([*(matcher.push(stream.push(i)) for i in ids), matcher.push(stream.flush())])
    assert shown + matcher.flush() == text.split(stop)[0]
    assert matcher.matched == (stop if stop in text else None)


def test_only_what_may_become_a_stop_is_held() -> None:
    matcher = StopMatcher(["</s>", "\n\n"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("two<") == "\ntwo"
    assert matcher.push("/") == "" and matcher.push("b") == "</b"
    assert matcher.push("x</s>y") == "x"
    assert (matcher.matched, matcher.push("more"), matcher.flush()) == ("</s>", "", "")


def test_unchecked_text_does_not_stop_but_may_begin_a_stop() -> None:
    matcher = StopMatcher("ab")
    assert matcher.push("abxa", check=False) == "abx"
    assert matcher.push("b") == "" and matcher.matched == "ab"
    late = StopMatcher("ab")
    assert late.push("ab", check=False) + late.push("c") + late.flush() == "abc"
    assert late.matched is None


def test_stop_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
    with pytest.raises(TypeError, match="int"):
        StopMatcher([3])  # type: ignore[list-item]
    assert StopMatcher([]).push("abc") == "abc"


def test_long_and_periodic_stops_take_linear_time() -> None:
    start = time.perf_counter()
    matcher = StopMatcher(["a" * 20000 + "b", "a" * 10000 + "c"])
    for _ in range(100):
        matcher.push("a" * 1000)
    assert len(matcher.flush()) == 20000
    assert time.perf_counter() - start < 5
