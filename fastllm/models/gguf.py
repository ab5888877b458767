"""GGUF files, memory-mapped: metadata as Python values, tensors as views of the map.

Layout (little endian): magic, version, counts; key-value pairs; tensor descriptions; padding to
the alignment; tensor data. Everything read is untrusted: every count, length, size and offset is
compared with the bytes that are really there, in Python's unbounded integers, before anything is
allocated or indexed. Parsing cost is linear in the size of the metadata.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import overload

import numpy as np
import torch

from fastllm.errors import ModelFileError
from fastllm.quantize.gguf_blocks import GGUF_TYPES

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 65535  # for keys by the specification; the same bound serves tensor names
MAX_ARRAY_DEPTH = 4
MAX_ELEMENTS = 1 << 62  # keeps every stride of a view inside int64

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, str]] = {  # value type -> (struct code, numpy dtype)
    0: ("<B", "<u1"), 1: ("<b", "<i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"),
    5: ("<i", "<i4"), 6: ("<f", "<f4"), 7: ("<B", "|b1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}  # fmt: skip
_U64 = struct.Struct("<Q")
_TENSOR_INFO_MIN_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dims, one dimension, type, offset
_PAIR_MIN_BYTES = 8 + 4 + 1  # key length, value type, the smallest value

Scalar = bool | int | float | str


class _Cursor:
    """Reads forward through the map; every read is checked against the end of the file."""

    __slots__ = ("buffer", "end", "path", "pos")

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.pos = 0
        self.end = len(buffer)

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

    def __init__(self, cursor: _Cursor, name: str, value_type: int, count: int, start: int) -> None:
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


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a file: `shape` in torch order (rows first), `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_name: str  # "F32", "Q4_1", ...
    offset: int
    nbytes: int
    _storage: torch.Tensor = field(repr=False)

    @property
    def data(self) -> torch.Tensor:
        """The bytes, uint8 [nbytes]: a view of the map, nothing is copied."""
        return self._storage[self.offset : self.offset + self.nbytes]


class GGUFFile:
    """An opened GGUF file: `metadata` and `tensors`. The map lives as long as any view of it.

    The map is private (copy on write): nothing can change the file through it, and tensors over
    it need no "not writable" warning. Clean pages of it belong to the page cache.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: Mapping[str, Value],
        tensors: Mapping[str, GGUFTensor],
        buffer: mmap.mmap,
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._buffer = buffer

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map and parse `path`. Raises ModelFileError, naming the field, on anything wrong."""
        path = Path(path)
        cursor = _Cursor(_map(path), path)
        version, tensor_count, pair_count = _read_header(cursor)
        metadata = _read_metadata(cursor, pair_count)
        alignment = _alignment(cursor, metadata)
        tensors = _read_tensors(cursor, tensor_count, alignment)
        return cls(path, version, metadata, tensors, cursor.buffer)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self._buffer)

    def release(self, tensor: GGUFTensor | None = None) -> None:
        """Give the resident pages of one tensor, or of the whole file, back to the system.

        Views stay valid: pages that are touched again are read again from the file.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):  # not a POSIX system: nothing to give back
            return
        start, stop = 0, len(self._buffer)
        if tensor is not None:
            page = mmap.PAGESIZE  # inward: neighbours may share the first and the last page
            start = -(-tensor.offset // page) * page
            stop = (tensor.offset + tensor.nbytes) // page * page
        if stop > start:
            self._buffer.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _map(path: Path) -> mmap.mmap:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ModelFileError(path, "file", "is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise ModelFileError(path, "header", f"a GGUF file cannot be {size} bytes long")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelFileError(path, "file", f"cannot be opened: {reason}") from error


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    if cursor.buffer[:4] != MAGIC:
        raise cursor.fail(
            "magic",
            f"is {cursor.buffer[:4]!r}, not {MAGIC!r}: not a GGUF file",
            "Give a .gguf file, or the directory that holds config.json and .safetensors files",
        )
    cursor.pos = 4
    version = cursor.integer("<I", "version")
    if version not in (2, 3):
        big = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3)
        problem = "the file is big endian" if big else f"version {version} is not supported"
        raise cursor.fail("version", problem, "Convert the model to little-endian GGUF v3")
    tensor_count = cursor.integer("<Q", "tensor_count")
    pair_count = cursor.integer("<Q", "metadata_kv_count")
    cursor.need(pair_count, _PAIR_MIN_BYTES, "metadata_kv_count")
    cursor.need(tensor_count, _TENSOR_INFO_MIN_BYTES, "tensor_count")
    return version, tensor_count, pair_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(count):
        key = cursor.string(f"metadata key {index}", MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(key, "appears twice in the metadata")
        value_type = cursor.integer("<I", key)
        metadata[key] = _read_value(cursor, key, value_type, 0)
    return metadata


def _read_value(cursor: _Cursor, name: str, value_type: int, depth: int) -> Value:
    if value_type == _STRING:
        return cursor.string(name)
    if value_type == _ARRAY:
        return _read_array(cursor, name, depth + 1)
    if value_type not in _SCALARS:
        raise cursor.fail(name, f"has the unknown value type {value_type}")
    value = cursor.scalar(_SCALARS[value_type][0], name)
    return value != 0 if value_type == _BOOL else value


def _read_array(cursor: _Cursor, name: str, depth: int) -> Value:
    if depth > MAX_ARRAY_DEPTH:
        raise cursor.fail(name, f"nests arrays more than {MAX_ARRAY_DEPTH} deep")
    element_type = cursor.integer("<I", name)
    count = cursor.integer("<Q", name)
    if element_type == _ARRAY:
        cursor.need(count, 12, name)
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


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 8
    if not valid or value & (value - 1):  # type: ignore[operator]
        raise cursor.fail("general.alignment", f"must be a power of two from 8, is {value!r:.80}")
    return int(value)  # type: ignore[arg-type]


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    cursor.need(count, _TENSOR_INFO_MIN_BYTES, "tensor_count")
    infos = {}
    for index in range(count):
        name = cursor.string(f"name of tensor {index}", MAX_NAME_BYTES)
        if name in infos:
            raise cursor.fail(name, "two tensors have this name")
        infos[name] = _read_tensor_info(cursor, name, alignment)
    data_start = -(-cursor.pos // alignment) * alignment
    storage = torch.frombuffer(cursor.buffer, dtype=torch.uint8)
    tensors = {}
    for name, (shape, type_name, offset, nbytes) in infos.items():
        if data_start + offset + nbytes > cursor.end:
            raise cursor.fail(
                name,
                f"needs {nbytes} bytes at offset {data_start + offset}, the file ends at "
                f"{cursor.end}",
                "The file is truncated or damaged: download it again",
            )
        tensors[name] = GGUFTensor(name, shape, type_name, data_start + offset, nbytes, storage)
    _check_overlap(cursor, tensors)
    return tensors


def _read_tensor_info(
    cursor: _Cursor, name: str, alignment: int
) -> tuple[tuple[int, ...], str, int, int]:
    """(shape in torch order, type name, offset from the data's start, bytes)."""
    dims = cursor.integer("<I", name)
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.fail(name, f"has {dims} dimensions; 1 to {MAX_DIMS} are allowed")
    sizes = [cursor.integer("<Q", name) for _ in range(dims)]  # fastest-varying first
    elements = 1
    for size in sizes:
        elements *= size
    if min(sizes) < 1 or elements > MAX_ELEMENTS:
        raise cursor.fail(name, f"has the impossible shape {sizes[::-1]}")
    type_id = cursor.integer("<I", name)
    kind = GGUF_TYPES.get(type_id)
    if kind is None:
        known = ", ".join(k.name for k in GGUF_TYPES.values())
        raise cursor.fail(name, f"has the unknown type {type_id}", f"Known types: {known}")
    if sizes[0] % kind.values:
        raise cursor.fail(
            name, f"rows of {sizes[0]} values are not whole {kind.name} blocks of {kind.values}"
        )
    offset = cursor.integer("<Q", name)
    if offset % alignment:
        raise cursor.fail(name, f"its offset {offset} is not a multiple of {alignment}")
    return tuple(sizes[::-1]), kind.name, offset, elements // kind.values * kind.nbytes


def _check_overlap(cursor: _Cursor, tensors: Mapping[str, GGUFTensor]) -> None:
    stop, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < stop:
            raise cursor.fail(tensor.name, f"its data overlaps that of {before}")
        stop, before = tensor.offset + tensor.nbytes, tensor.name
