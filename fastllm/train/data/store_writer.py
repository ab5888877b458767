"""Writes a token store aside and puts it in its place when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm.errors import DataError
from fastllm.models.disk import sha256_file, sync

from .store import (
    DOCUMENTS,
    DTYPES,
    FORMAT,
    INDEX,
    OFFSETS,
    TOKENS,
    VERSION,
    Split,
    TokenStore,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What a store says of the tokenizer that made it."""

    vocab_size: int
    start_token_id: int  # read before a document's first token
    end_token_id: int  # stored after its last one
    sha256: str = ""  # Tokenizer.fingerprint
    name: str = ""  # the directory it was read from

    @property
    def dtype(self) -> str:
        """The smallest integer that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


class StoreWriter:
    """Context manager: `split`, `add` each document, `finish`. Leaving without `finish` leaves
    nothing behind and nothing changed."""

    def __init__(
        self, directory: str | PathLike[str], vocabulary: Vocabulary, *, overwrite: bool = False
    ) -> None:
        """Raises DataError if `directory` exists and is not a store to overwrite."""
        self.directory = Path(os.path.abspath(directory))
        self.vocabulary = vocabulary
        self._dtype = DTYPES[vocabulary.dtype]
        self._overwrite = overwrite
        check_target(self.directory, overwrite=overwrite)
        self._splits: dict[str, list[int]] = {}  # name -> the four numbers of Split
        self._lengths = array("q")
        self._done = False

    def __enter__(self) -> StoreWriter:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place: a rename works within one file system only.
        prefix = f".{self.directory.name}.writing-"
        self._aside = Path(tempfile.mkdtemp(prefix=prefix, dir=self.directory.parent))
        self._file = (self._aside / TOKENS).open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if not self._done:
            shutil.rmtree(self._aside)

    def split(self, name: str) -> None:
        """The documents that follow belong to split `name`."""
        if name in self._splits:
            raise ValueError(f"split {name!r} was written already")
        self._splits[name] = self._counts = [len(self._lengths), 0, 0, 0]

    def add(self, tokens: Sequence[int] | NDArray[Any], text_bytes: int = 0) -> None:
        """Append a document: its tokens with the end token, and the bytes of its text as UTF-8."""
        wide = np.asarray(tokens, np.int64)
        if not wide.size:
            raise ValueError(f"document {len(self._lengths)} has no tokens")
        if int(wide.min()) < 0 or int(wide.max()) >= self.vocabulary.vocab_size:
            raise ValueError(
                f"document {len(self._lengths)} holds a token id outside the vocabulary of "
                f"{self.vocabulary.vocab_size}"
            )
        self._file.write(wide.astype(self._dtype).data)
        self._lengths.append(wide.size)
        for i, more in enumerate((0, 1, wide.size, text_bytes)):
            self._counts[i] += more

    def finish(
        self,
        *,
        settings: Mapping[str, Any] | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> TokenStore:
        """Sync, hash and rename; the store that is now in place.

        Where an older store is replaced it is renamed away first and deleted last: a process killed
        between the two renames leaves it as `.NAME.replaced-*` beside the place.
        """
        _sync(self._file)
        offsets = np.zeros(len(self._lengths) + 1, OFFSETS)
        np.cumsum(self._lengths, out=offsets[1:])
        with (self._aside / DOCUMENTS).open("wb") as file:
            offsets.tofile(file)
            _sync(file)
        with (self._aside / INDEX).open("w", encoding="utf-8", newline="\n") as text:
            json.dump(self._index(settings, report), text, ensure_ascii=False, indent=2)
            text.write("\n")
            _sync(text)
        self._file.close()
        _replace(self._aside, self.directory)
        self._done = True
        return TokenStore.open(self.directory)

    def _index(
        self, settings: Mapping[str, Any] | None, report: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        files = {
            name: {
                "bytes": (self._aside / name).stat().st_size,
                "sha256": sha256_file(self._aside / name),
            }
            for name in (TOKENS, DOCUMENTS)
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.vocabulary.dtype,
            "documents": len(self._lengths),
            "tokens": sum(self._lengths),
            "splits": {name: asdict(Split(*counts)) for name, counts in self._splits.items()},
            "files": files,
            "tokenizer": asdict(self.vocabulary),
            "settings": dict(settings or {}),
            "report": dict(report or {}),
        }


def write_store(
    directory: str | PathLike[str],
    splits: Mapping[str, Iterable[Sequence[int]]],
    vocabulary: Vocabulary,
    *,
    overwrite: bool = False,
) -> TokenStore:
    """A store of documents that are tokens already, end tokens included, split by split."""
    with StoreWriter(directory, vocabulary, overwrite=overwrite) as writer:
        for name, documents in splits.items():
            writer.split(name)
            for document in documents:
                writer.add(document)
        return writer.finish()


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Raises DataError if a store must not be written at `directory`: something else is there, or
    a store and not `overwrite`."""
    if not directory.exists():
        return
    if not directory.is_dir() or (any(directory.iterdir()) and not (directory / INDEX).is_file()):
        remedy = "Give --out a directory that does not exist or holds a token store"
        raise DataError(directory, "", "", "is there already and is not a token store", remedy)
    if not overwrite and (directory / INDEX).is_file():
        remedy = "Give another --out, or --overwrite to replace it"
        raise DataError(directory, "", "", "a token store is there already", remedy)


def _replace(aside: Path, place: Path) -> None:
    aside.chmod(0o777 & ~_umask())  # mkdtemp makes private directories
    if place.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{place.name}.replaced-", dir=place.parent))
        place.rename(old / "store")
        aside.rename(place)
        shutil.rmtree(old)
    else:
        aside.rename(place)
    sync(place.parent)  # the rename itself


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
