"""Files as people have them: what is read from them, and what is said about those that are odd."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.errors import DataError
from fastllm.train.data import sources
from fastllm.train.data.sources import Reader, SourceOptions, split_documents
from fastllm.train.data.tokenizing import pieces_of


def read(*inputs: Path, warnings: list[str] | None = None, **options: Any) -> list[str]:
    said: list[str] = [] if warnings is None else warnings
    reader = Reader([str(path) for path in inputs], SourceOptions(**options), said.append)
    texts = [document.text for document in reader]
    assert reader.bytes_done == reader.bytes_total
    return texts


def file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_text_file_is_a_document_or_several(tmp_path: Path, suffix: str) -> None:
    path = file(tmp_path / f"a.txt{suffix}", "one\n\n \n\ntwo\nlines\r\n\r\nthree\n")
    assert read(path) == ["one\n\n \n\ntwo\nlines\r\n\r\nthree\n"]
    assert read(path, separator="blank-line") == ["one", "two\nlines", "three"]
    assert read(path, separator="two") == ["one\n\n \n\n", "\nlines\r\n\r\nthree\n"]


@given(
    pieces=st.lists(st.text("ab\n\r ", max_size=6), max_size=12),
    separator=st.sampled_from([None, "blank-line", "a", "ba", "\n"]),
)
def test_documents_do_not_depend_on_how_a_text_is_read(
    pieces: list[str], separator: str | None
) -> None:
    whole = list(split_documents(["".join(pieces)], separator))
    assert list(split_documents(pieces, separator)) == whole
    assert all(text.strip() for text in whole)


def test_records_give_their_fields(tmp_path: Path) -> None:
    rows = [{"text": "a", "title": "t"}, {"text": "b", "title": "u"}]
    lines = "\n".join(map(json.dumps, rows))
    for path in (file(tmp_path / "a.jsonl", lines), file(tmp_path / "b.jsonl.gz", lines)):
        assert read(path) == ["a", "b"]
        assert read(path, text_fields=("title", "text")) == ["t\na", "u\nb"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"text": "a"}\n{"body": "b"}', "line 2: text: the record has no such field.*has body"),
        ('{"text": "a"}\n{"text": 3}', "line 2: text: is a int"),
        ('{"text": "a"}\n\n{"text": "b"', "line 3: not JSON"),
    ],
)
def test_malformed_records_are_named(tmp_path: Path, lines: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(file(tmp_path / "a.jsonl", lines))


def test_parquet_gives_a_column_of_text(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "data" / "a.parquet"
    path.parent.mkdir()
    parquet.write_table(arrow.table({"text": ["a", "b", None], "n": [1, 2, 3]}), path)
    assert read(path) == ["a", "b", ""]
    with pytest.raises(DataError, match=r"body: the file has no such column.*It has text, n"):
        read(path, text_fields=("body",))
    with pytest.raises(DataError, match="record 1: n: is a int"):
        read(path, text_fields=("n",))
    with pytest.raises(DataError, match="not a parquet file"):
        read(file(tmp_path / "bad.parquet", b"PAR1 this is not one PAR1"))


@pytest.mark.full
def test_a_data_set_id_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("datasets")
    file(tmp_path / "set" / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    reader = Reader([f"hf:{tmp_path / 'set'}"])
    assert [document.text for document in reader] == ["a", "b"]
    assert reader.bytes_total is None


def test_folders_give_known_types_in_a_fixed_order(tmp_path: Path) -> None:
    file(tmp_path / "b" / "x.txt", "bx")
    file(tmp_path / "a.py", "a = 1")
    file(tmp_path / "c.jsonl", '{"text": "c"}')
    file(tmp_path / "image.png", b"\x89PNG\0")
    file(tmp_path / "settings.json", '[{"text": "d"}]')
    file(tmp_path / ".git" / "hidden.txt", "no")
    reader = Reader([str(tmp_path)])
    assert [document.text for document in reader] == ["a = 1", "bx", "c"]
    assert reader.skipped == {"other type": 2} and reader.files == 3
    assert read(tmp_path, patterns=("*.py", "*.json")) == ["a = 1", "d"]
    with pytest.raises(DataError, match=r"holds no files of \*.rs"):
        read(tmp_path, patterns=("*.rs",))


def test_bytes_that_are_not_utf8_are_replaced_counted_and_named(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", b"x" * 97 + b"\xe9tat, caf\xe9\n" + b"y" * 100)
    said: list[str] = []
    (text,) = read(path, warnings=said)
    assert text.count("\ufffd") == 2
    assert "a.txt: byte 97: 0xe9 is not UTF-8" in said[0]
    assert "2 places" in said[1]
    with pytest.raises(DataError, match="byte 97: 0xe9 is not UTF-8"):
        read(path, bad_bytes="error")


def test_a_character_across_two_reads_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\ufeffaé字😀" * 5
    path = file(tmp_path / "a.txt", text)
    for size in (3, 4, 5, 11):  # the mark itself is in the first read
        monkeypatch.setattr(sources, "_CHUNK", size)
        assert read(path) == [text[1:]]
    bad = file(tmp_path / "b.txt", b"abcdefghijklmnopqrstuvwxyz\xe5\xad")  # ends in a character
    monkeypatch.setattr(sources, "_CHUNK", 32)
    said: list[str] = []
    assert read(bad, warnings=said)[0].endswith("z\ufffd") and "byte 26" in said[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"text\0more", r"byte 4: is binary \(a null byte\)"),
        ("état, café, garçon, où".encode("latin-1"), "byte 0: 0xe9 and much after it is not UTF-8"),
        ("春眠不觉晓".encode("gb18030"), "is not UTF-8"),
        (b"\xff\xfea\0b", "begins as UTF-16 and is not"),
    ],
)
def test_what_is_not_text_is_an_error_or_skipped_in_folders(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = file(tmp_path / "a.txt", content)
    file(tmp_path / "b.txt", "fine")
    with pytest.raises(DataError, match=words):
        read(path)
    if "UTF-16" not in words:
        said: list[str] = []
        assert read(tmp_path, warnings=said) == ["fine"]
        assert "skipped" in said[0] and "a.txt" in said[0]


def test_utf16_with_its_mark_is_text(tmp_path: Path) -> None:
    assert read(file(tmp_path / "a.txt", "wörds 字".encode("utf-16"))) == ["wörds 字"]


def test_empty_files_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    assert read(file(tmp_path / "a.txt", "\n\n"), warnings=said) == []
    assert "a.txt: the file is empty" in said[0]


def test_damaged_compression_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"text" * 1000)[:-8])
    with pytest.raises(DataError, match="compressed data is damaged"):
        read(path)


def test_a_missing_path_does_not_go_to_the_network(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a data set of the Hub is written hf:org/name"):
        list(Reader(["org/name"]))


@given(st.text("ab \n", max_size=400))
def test_pieces_of_a_long_text_join_to_it(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastllm.train.data.tokenizing._PIECE_CHARS", 8)
        pieces = pieces_of(text)
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert not any(piece[:1].isspace() for piece in pieces[1:])


def test_of_many_empty_files_a_few_are_named(tmp_path: Path) -> None:
    for number in range(9):
        file(tmp_path / f"{number}.txt", "")
    said: list[str] = []
    reader = Reader([str(tmp_path)], warn=said.append)
    assert list(reader) == [] and reader.skipped == {"empty": 9}
    assert len(said) == 5 and said[-1].endswith("(further ones are only counted)")


def test_half_a_character_is_replaced_and_counted(tmp_path: Path) -> None:
    path = file(tmp_path / "a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}')
    said: list[str] = []
    assert read(path, warnings=said) == ["a\ufffdb 😀"]
    assert "line 1: a lone surrogate is replaced" in said[0]
    with pytest.raises(DataError, match="line 1: holds the lone surrogate"):
        read(path, bad_bytes="error")
