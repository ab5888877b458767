"""The metadata of a GGUF file: key-value pairs of scalars, strings and arrays.

Everything read is untrusted: every count and length is compared with the bytes that are really
there, in Python's unbounded integers, before anything is allocated or indexed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import overload

import numpy as np

from fastllm.errors import ModelFileError

MAX_NAME_BYTES = 65535  # for keys by the specification; the same bound serves tensor names
MAX_ARRAY_DEPTH = 4
# Published files have up to 100 pairs and 10,000 tensors. The bounds here and on tensors keep the
# Python objects of a hostile file, which can be ten times its bytes, under 100 MB, and parsing
# under two seconds.
MAX_PAIRS = 1 << 16
MAX_NESTED_ARRAYS = 1 << 16
MAX_STRINGS = 1 << 24

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, str]] = {  # value type -> (struct code, numpy dtype)
    0: ("<B", "<u1"), 1: ("<b", "<i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"),
    5: ("<i", "<i4"), 6: ("<f", "<f4"), 7: ("<B", "|b1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}  # fmt: skip
_U64 = struct.Struct("<Q")

Scalar = bool | int | float | str


class Cursor:
    """Reads forward through the map; every read is checked against the end of the file."""

    __slots__ = ("arrays", "buffer", "end", "path", "pos")

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.pos = 0
        self.end = len(buffer)
        self.arrays = 0  # arrays inside arrays, so far

    def fail(self, where: str, problem: str, remedy: str = "") -> ModelFileError:
        return ModelFileError(self.path, where, problem, remedy)

    def need(self, count: int, size: int, where: str) -> None:
        """Raise unless `count` items of at least `size` bytes still fit in the file."""
        left = self.end - self.pos
        if count * size > left:
            raise self.fail(
                where,
                f"claims {count} items of at least {size} bytes at offset {self.pos}, but only "
                f"{left} bytes are left",
                "The file is truncated or damaged: download it again",
            )

    def at_most(self, count: int, limit: int, where: str) -> None:
        if count > limit:
            raise self.fail(where, f"claims {count} items, more than the allowed {limit}")

    def scalar(self, code: str, where: str) -> int | float:
        size = struct.calcsize(code)
        self.need(1, size, where)
        value: int | float = struct.unpack_from(code, self.buffer, self.pos)[0]
        self.pos += size
        return value

    def integer(self, code: str, where: str) -> int:
        return int(self.scalar(code, where))

    def string(self, where: str, limit: int | None = None) -> str:
        length = self.integer("<Q", where)
        if limit is not None and length > limit:
            raise self.fail(where, f"is {length} bytes long, more than the allowed {limit}")
        self.need(length, 1, where)
        raw = self.buffer[self.pos : self.pos + length]
        self.pos += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(where, f"is not valid UTF-8 ({error.reason})") from None

    def skip_strings(self, count: int, where: str) -> None:
        """Walk over `count` strings: 98,000 of them take about 15 ms."""
        self.need(count, 8, where)
        self.at_most(count, MAX_STRINGS, where)
        unpack, buffer, pos = _U64.unpack_from, self.buffer, self.pos
        try:
            for _ in repeat(None, count):
                pos += unpack(buffer, pos)[0] + 8
        except (struct.error, OverflowError):
            pos = self.end + 1
        if pos > self.end:
            raise self.fail(
                where,
                "holds a string that runs past the end of the file",
                "The file is truncated or damaged: download it again",
            )
        self.pos = pos


class MetadataArray(Sequence[Scalar]):
    """An array value, decoded when it is looked at. The bounds were checked before.

    Iterating decodes one value after the other and keeps none (a vocabulary and its merges take
    8 MB as Python strings); indexing and `tolist` keep the values.
    """

    __slots__ = ("_buffer", "_count", "_path", "_start", "_type", "_values", "name")

    def __init__(self, cursor: Cursor, name: str, value_type: int, count: int, start: int) -> None:
        self.name = name
        self._path = cursor.path
        self._buffer = cursor.buffer
        self._type = value_type
        self._count = count
        self._start = start
        self._values: list[Scalar] | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Scalar]:
        if self._values is None and self._type == _STRING:
            return self._iter_strings()
        return iter(self.tolist())

    @overload
    def __getitem__(self, index: int) -> Scalar: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Scalar]: ...
    def __getitem__(self, index: int | slice) -> Scalar | Sequence[Scalar]:
        return self.tolist()[index]

    def __repr__(self) -> str:
        kind = "str" if self._type == _STRING else _SCALARS[self._type][1].lstrip("<|")
        return f"MetadataArray({self.name!r}, {self._count} x {kind})"

    def tolist(self) -> list[Scalar]:
        """All values. Raises ModelFileError if a string is not valid UTF-8."""
        if self._values is None:
            self._values = self._strings() if self._type == _STRING else self.numpy().tolist()
        return self._values

    def numpy(self) -> np.ndarray:
        """Numeric values as an array of their own type (a copy). TypeError for strings."""
        if self._type == _STRING:
            raise TypeError(f"{self.name} is an array of strings; use tolist()")
        dtype = _SCALARS[self._type][1]
        if self._type == _BOOL:  # any nonzero byte counts as true, as C readers have it
            raw = np.frombuffer(self._buffer, np.uint8, self._count, self._start)
            return raw != 0
        return np.frombuffer(self._buffer, dtype, self._count, self._start).copy()

    def _strings(self) -> list[Scalar]:
        return list(self._iter_strings())

    def _iter_strings(self) -> Iterator[Scalar]:
        unpack, buffer, pos = _U64.unpack_from, self._buffer, self._start
        for index in range(self._count):
            stop = pos + 8 + unpack(buffer, pos)[0]
            try:
                yield buffer[pos + 8 : stop].decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{self.name}[{index}]"
                raise ModelFileError(
                    self._path, where, f"is not valid UTF-8 ({error.reason})"
                ) from None
            pos = stop


Value = Scalar | MetadataArray | list["Value"]


def read_metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    """`count` pairs from the cursor's place on. Raises ModelFileError naming the key."""
    metadata: dict[str, Value] = {}
    for index in range(count):
        key = cursor.string(f"metadata key {index}", MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(key, "appears twice in the metadata")
        value_type = cursor.integer("<I", key)
        metadata[key] = _read_value(cursor, key, value_type, 0)
    return metadata


def _read_value(cursor: Cursor, name: str, value_type: int, depth: int) -> Value:
    if value_type == _STRING:
        return cursor.string(name)
    if value_type == _ARRAY:
        return _read_array(cursor, name, depth + 1)
    if value_type not in _SCALARS:
        raise cursor.fail(name, f"has the unknown value type {value_type}")
    value = cursor.scalar(_SCALARS[value_type][0], name)
    return value != 0 if value_type == _BOOL else value


def _read_array(cursor: Cursor, name: str, depth: int) -> Value:
    if depth > MAX_ARRAY_DEPTH:
        raise cursor.fail(name, f"nests arrays more than {MAX_ARRAY_DEPTH} deep")
    element_type = cursor.integer("<I", name)
    count = cursor.integer("<Q", name)
    if element_type == _ARRAY:
        cursor.need(count, 12, name)
        cursor.arrays += count
        cursor.at_most(cursor.arrays, MAX_NESTED_ARRAYS, name)
        return [_read_array(cursor, f"{name}[{i}]", depth + 1) for i in range(count)]
    start = cursor.pos
    if element_type == _STRING:
        cursor.skip_strings(count, name)
    elif element_type in _SCALARS:
        size = struct.calcsize(_SCALARS[element_type][0])
        cursor.need(count, size, name)
        cursor.pos += count * size
    else:
        raise cursor.fail(name, f"has the unknown element type {element_type}")
    return MetadataArray(cursor, name, element_type, count, start)
