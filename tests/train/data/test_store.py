"""A store is whole, or it is refused; writing one replaces nothing before it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastllm.errors import DataError
from fastllm.train.data.store import TokenStore
from fastllm.train.data.store_writer import StoreWriter, Vocabulary, write_store

SMALL = Vocabulary(vocab_size=100, start_token_id=0, end_token_id=0)
DOCUMENTS = {"train": [[5, 6, 7, 0], [8, 0]], "holdout": [[9, 9, 0]]}


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "store", DOCUMENTS, SMALL)


def test_a_store_gives_back_its_documents(store: TokenStore) -> None:
    again = TokenStore.open(store.directory, verify=True)
    assert [again.document(i).tolist() for i in range(3)] == [[5, 6, 7, 0], [8, 0], [9, 9, 0]]
    assert again.lengths("train").tolist() == [4, 2]
    assert (again.split("holdout").first, again.split("holdout").tokens) == (2, 3)
    assert again.fingerprint == store.fingerprint
    with pytest.raises(IndexError):
        again.document(3)


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_tokens_take_the_smallest_integers(tmp_path: Path, size: int, dtype: str) -> None:
    vocabulary = Vocabulary(vocab_size=size, start_token_id=0, end_token_id=size - 1)
    store = write_store(tmp_path / "s", {"train": [[1, size - 1]]}, vocabulary)
    assert store.tokens.dtype == np.dtype(dtype)
    assert store.document(0).tolist() == [1, size - 1]


def test_the_tokens_are_mapped_and_not_read(store: TokenStore) -> None:
    assert isinstance(store.tokens, np.memmap) and isinstance(store.offsets, np.memmap)
    assert not store.tokens.flags.writeable


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def rewrite(path: Path, **changes: object) -> None:
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("tokens.bin", truncate, "has 16 bytes; its index says 18"),
        ("documents.bin", truncate, "torn"),
        ("tokens.bin", Path.unlink, "does not exist; its index says"),
        ("index.json", Path.unlink, "the file does not exist"),
        ("index.json", truncate, "not valid JSON"),
        ("index.json", lambda p: rewrite(p, version=2), "reads version 1"),
        ("index.json", lambda p: rewrite(p, format="x"), "format: is not"),
        ("index.json", lambda p: rewrite(p, dtype="int8"), "dtype: is 'int8'"),
        ("index.json", lambda p: rewrite(p, files={}), r"files.tokens.bin.bytes: is None"),
        ("index.json", lambda p: rewrite(p, splits={"a": {}}), "splits.a.first: is None"),
        ("index.json", lambda p: rewrite(p, splits={}), "leave documents out"),
    ],
)
def test_damage_that_shows_is_found_at_opening(
    store: TokenStore, name: str, damage: Callable[[Path], None], words: str
) -> None:
    damage(store.directory / name)
    with pytest.raises(DataError, match=words) as caught:
        TokenStore.open(store.directory)
    assert name in str(caught.value) or "documents.bin" in str(caught.value)


def test_offsets_that_do_not_ascend_are_found_at_opening(store: TokenStore) -> None:
    np.array([0, 6, 4, 9], "<u8").tofile(store.directory / "documents.bin")
    with pytest.raises(DataError, match="do not ascend"):
        TokenStore.open(store.directory)


def test_verify_finds_a_changed_byte(store: TokenStore) -> None:
    path = store.directory / "tokens.bin"
    path.write_bytes(b"\x06" + path.read_bytes()[1:])
    TokenStore.open(store.directory)
    with pytest.raises(DataError, match=r"tokens.bin: its contents are not those"):
        TokenStore.open(store.directory, verify=True)


@pytest.mark.parametrize("document", [[], [100], [-1]])
def test_documents_must_be_tokens_of_the_vocabulary(tmp_path: Path, document: list[int]) -> None:
    with pytest.raises(ValueError, match="document 0"):
        write_store(tmp_path / "s", {"train": [document]}, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_stays_until_its_replacement_is_whole(store: TokenStore) -> None:
    path = store.directory
    with pytest.raises(DataError, match="--overwrite"):
        write_store(path, DOCUMENTS, SMALL)
    with pytest.raises(KeyError), StoreWriter(path, SMALL, overwrite=True) as writer:
        writer.split("train")
        writer.add([1, 0])
        raise KeyError
    assert TokenStore.open(path, verify=True).fingerprint == store.fingerprint
    new = write_store(path, {"train": [[1, 0]]}, SMALL, overwrite=True)
    assert new.fingerprint != store.fingerprint and len(new.tokens) == 2
    assert [p.name for p in path.parent.iterdir()] == ["store"]


def test_what_is_not_a_store_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(DataError, match="is not a token store"):
        write_store(tmp_path / "notes", DOCUMENTS, SMALL, overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"
