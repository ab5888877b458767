"""Records of data files, one by one, each with the place that an error message names.

JSON lines (.jsonl, .ndjson, also .gz), a JSON array (.json, also .gz; a .json file of lines is read
as lines) and parquet.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from fastllm.errors import DataError

_LINES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"  # some editors begin UTF-8 files with it
_DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error)  # what reading a broken gzip file raises
SUFFIXES = (*_LINES, ".json", ".parquet")


def is_record_file(path: Path) -> bool:
    """Whether the name is one of a file that `read_records` reads."""
    return _plain_name(path).endswith(SUFFIXES)


def read_records(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each record: place is "line 3" or "record 3", counted from 1.

    Blank lines are skipped. Absent values of parquet's columns are left out of the records, as they
    are in JSON. columns: of parquet, the only ones to read. Raises DataError naming file, place and
    problem; FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    name = _plain_name(path)
    if name.endswith(".parquet"):
        found = _parquet(path, columns)
    elif name.endswith(_LINES):
        found = _lines(path)
    elif name.endswith(".json"):
        found = _array(path) if _starts_with_bracket(path) else _lines(path)
    else:
        known = ", ".join(SUFFIXES)
        raise DataError(path, "", "", "the name does not say what is in it", f"Known: {known}")
    for place, record in found:
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(path, place, "", f"is a JSON {kind}", "Each record is a JSON object")
        yield place, record


def _plain_name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _starts_with_bracket(path: Path) -> bool:
    with _open(path) as file:
        try:
            return file.read(4096).removeprefix(_BOM).lstrip()[:1] == b"["
        except _DAMAGE as error:
            raise DataError(path, "", "", f"not a gzip file: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield f"line {number}", _parse(path, f"line {number}", line)
        except _DAMAGE as error:
            raise DataError(
                path, f"line {number + 1}", "", f"the compressed data is damaged: {error}"
            ) from error


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        records = _parse(path, "", file.read().removeprefix(_BOM))
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def _parse(path: Path, place: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte {text[error.start]:#04x} at offset {error.start}"
        raise DataError(path, place, "", problem, "Convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if place else f"line {error.lineno} column {error.colno}"
        raise DataError(path, place, "", f"not JSON: {error.msg} at {where}") from error
    except (ValueError, RecursionError) as error:  # digits beyond Python's limit, nesting
        raise DataError(path, place, "", f"not JSON that can be read: {error}") from error


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: reading parquet needs pyarrow: pip install pyarrow"
        ) from error
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    remedy = f"It has {', '.join(names)}"
                    raise DataError(path, "", column, "the file has no such column", remedy)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"record {number}", _without_absent(record)
    except pyarrow.ArrowInvalid as error:
        raise DataError(path, "", "", f"not a parquet file: {error}") from error


def _without_absent(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_absent(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_absent(item) for item in value]
    return value
