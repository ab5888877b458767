"""The token store: a directory of tokenized documents that training maps into memory.

    tokens.bin      every document's tokens, end to end: uint16, or uint32 for vocabularies that
                    need it. A document ends with its end-of-text token.
    documents.bin   uint64 [documents + 1]: where each begins in tokens.bin, and the end
    index.json      format version, sizes and SHA-256 of both, the tokenizer's hash, the splits,
                    what was dropped and why

A split is a range of documents: "train" first, then "holdout". All numbers are little-endian. A
store is written aside and renamed when it is complete, so a directory of that name is whole or was
damaged later; `TokenStore.open` finds the damage that shows in sizes, `verify=True` any other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm.errors import DataError
from fastllm.models.disk import sha256_file

FORMAT = "fastllm-token-store"
VERSION = 1
TOKENS, DOCUMENTS, INDEX = "tokens.bin", "documents.bin", "index.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSETS = np.dtype("<u8")

_REMEDY = "Prepare the store again (fastllm data prepare --overwrite)"
_SPLIT_FIELDS = ("first", "documents", "tokens", "text_bytes")
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Split:
    """A range of a store's documents."""

    first: int  # document
    documents: int
    tokens: int  # end-of-text tokens included
    text_bytes: int  # of UTF-8, so loss per token becomes bits per byte


class TokenStore:
    """A store that is open for reading. It holds no more than two memory maps."""

    def __init__(
        self,
        directory: Path,
        index: dict[str, Any],
        tokens: NDArray[np.unsignedinteger],
        offsets: NDArray[np.uint64],
    ) -> None:
        """Use `TokenStore.open`."""
        self.directory = directory
        self.index = index
        self.tokens = tokens  # [tokens] uint16 or uint32
        self.offsets = offsets  # [documents + 1] uint64
        self.splits = {
            name: Split(*(split[field] for field in _SPLIT_FIELDS))
            for name, split in index["splits"].items()
        }
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.start_token_id: int = index["tokenizer"]["start_token_id"]
        self.end_token_id: int = index["tokenizer"]["end_token_id"]

    @classmethod
    def open(cls, directory: str | PathLike[str], *, verify: bool = False) -> TokenStore:
        """Map a store.

        verify: also read all of it: hashes, order of the offsets, tokens within the vocabulary.
        Raises DataError, naming the file, if the store is missing, torn or damaged.
        """
        path = Path(directory)
        index = _read_index(path / INDEX)
        for name in (TOKENS, DOCUMENTS):
            _check_size(path / name, index["files"][name]["bytes"])
        tokens = _map(path / TOKENS, DTYPES[index["dtype"]])
        offsets = _map(path / DOCUMENTS, OFFSETS)
        store = cls(path, index, tokens, offsets)
        _check_counts(store)
        if verify:
            store.verify()
        return store

    def verify(self) -> None:
        """Read the whole store and compare it with its index; raises DataError."""
        for name in (TOKENS, DOCUMENTS):
            if sha256_file(self.directory / name) != self.index["files"][name]["sha256"]:
                problem = "its contents are not those that were written (SHA-256 differs)"
                raise DataError(self.directory / name, "", "", problem, _REMEDY)
        if self.tokens.size and int(self.tokens.max()) >= self.vocab_size:
            problem = f"holds a token id outside the vocabulary of {self.vocab_size}"
            raise DataError(self.directory / TOKENS, "", "", problem, _REMEDY)

    @property
    def fingerprint(self) -> str:
        """Names the tokens and their order: SHA-256 over the hashes of both files."""
        files = self.index["files"]
        text = "".join(files[name]["sha256"] for name in (TOKENS, DOCUMENTS))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def tokenizer_hash(self) -> str:
        """`Tokenizer.fingerprint` of the tokenizer that made the tokens; empty: not known."""
        return self.index["tokenizer"]["sha256"]

    def split(self, name: str) -> Split:
        """A split by name. Raises ValueError naming those that exist."""
        if name not in self.splits:
            raise ValueError(
                f"{self.directory} has no split {name!r}, only {', '.join(self.splits)}"
            )
        return self.splits[name]

    def lengths(self, split: str) -> NDArray[np.int64]:
        """[documents of the split] int64: tokens of each document."""
        part = self.split(split)
        edges = self.offsets[part.first : part.first + part.documents + 1].astype(np.int64)
        return edges[1:] - edges[:-1]

    def document(self, number: int) -> NDArray[np.unsignedinteger]:
        """A document's tokens, its end-of-text token included: a view of the file."""
        if not 0 <= number < len(self.offsets) - 1:
            raise IndexError(f"document {number} of a store that has {len(self.offsets) - 1}")
        return self.tokens[int(self.offsets[number]) : int(self.offsets[number + 1])]


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        remedy = "Give the directory that `fastllm data prepare --out` wrote"
        raise DataError(path, "", "", "the file does not exist", remedy)
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(path, "", "", f"not valid JSON: {error}", _REMEDY) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(path, "", "format", f"is not {FORMAT!r}", _REMEDY)
    if index.get("version") != VERSION:
        problem = f"is {index.get('version')!r}; this fastllm reads version {VERSION}"
        raise DataError(path, "", "version", problem, _REMEDY)
    _check_index(path, index)
    return index


def _check_index(path: Path, index: dict[str, Any]) -> None:
    """Every field that is read later exists and has its type."""
    wanted: list[tuple[tuple[str, ...], type]] = [
        (("dtype",), str),
        (("files", TOKENS, "bytes"), int),
        (("files", TOKENS, "sha256"), str),
        (("files", DOCUMENTS, "bytes"), int),
        (("files", DOCUMENTS, "sha256"), str),
        (("tokenizer", "sha256"), str),
        *((("tokenizer", n), int) for n in ("vocab_size", "start_token_id", "end_token_id")),
        (("splits",), dict),
    ]
    splits = index.get("splits")
    for name in splits if isinstance(splits, dict) else ():
        wanted += [(("splits", name, field), int) for field in _SPLIT_FIELDS]
    for keys, kind in wanted:
        value: Any = index
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if type(value) is not kind or (type(value) is int and value < 0):
            field = ".".join(keys)
            raise DataError(path, "", field, f"is {value!r}, not a {kind.__name__}", _REMEDY)
    if index["dtype"] not in DTYPES:
        problem = f"is {index['dtype']!r}, not one of {', '.join(DTYPES)}"
        raise DataError(path, "", "dtype", problem, _REMEDY)


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        have = "does not exist" if found is None else f"has {found} bytes"
        raise DataError(path, "", "", f"{have}; its index says {size} bytes: torn", _REMEDY)


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size % dtype.itemsize:
        raise DataError(path, "", "", f"is not a whole number of {dtype.name}", _REMEDY)
    if path.stat().st_size == 0:  # nothing to map
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _check_counts(store: TokenStore) -> None:
    """Offsets and splits describe the same documents and tokens."""
    path = store.directory / DOCUMENTS
    offsets = store.offsets
    if not len(offsets) or int(offsets[0]) != 0 or int(offsets[-1]) != len(store.tokens):
        raise DataError(path, "", "", f"does not cover the {len(store.tokens)} tokens", _REMEDY)
    for low in range(0, len(offsets) - 1, _CHUNK):
        part = offsets[low : low + _CHUNK + 1]
        if not (part[1:] > part[:-1]).all():
            raise DataError(path, "", "", "its offsets do not ascend", _REMEDY)
    first = 0
    for name, split in store.splits.items():
        last = split.first + split.documents
        if split.first != first or last >= len(offsets):
            raise DataError(path, "", f"split {name!r}", "is not a range of documents", _REMEDY)
        if int(offsets[last]) - int(offsets[first]) != split.tokens:
            raise DataError(path, "", f"split {name!r}", "its token count is wrong", _REMEDY)
        first = last
    if first != len(offsets) - 1:
        raise DataError(path, "", "", "the splits leave documents out", _REMEDY)
