"""GGUF files, memory-mapped: metadata as Python values, tensors as views of the map.

Layout (little endian): magic, version, counts; key-value pairs; tensor descriptions; padding to
the alignment; tensor data. As in gguf_metadata.py, every count, size and offset is compared with
the bytes that are really there before anything is allocated or indexed.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastllm.errors import ModelFileError
from fastllm.models.gguf_metadata import MAX_NAME_BYTES, MAX_PAIRS, Cursor, Value, read_metadata
from fastllm.quantize.gguf_blocks import GGUF_TYPES

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ELEMENTS = 1 << 62  # keeps every stride of a view inside int64
MAX_TENSORS = 1 << 16  # published files have up to 10,000

_TENSOR_INFO_MIN_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dims, one dimension, type, offset
_PAIR_MIN_BYTES = 8 + 4 + 1  # key length, value type, the smallest value


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
        cursor = Cursor(_map(path), path)
        version, tensor_count, pair_count = _read_header(cursor)
        metadata = read_metadata(cursor, pair_count)
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


def _read_header(cursor: Cursor) -> tuple[int, int, int]:
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
    cursor.at_most(pair_count, MAX_PAIRS, "metadata_kv_count")
    cursor.at_most(tensor_count, MAX_TENSORS, "tensor_count")
    return version, tensor_count, pair_count


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 8
    if not valid or value & (value - 1):  # type: ignore[operator]
        raise cursor.fail("general.alignment", f"must be a power of two from 8, is {value!r:.80}")
    return int(value)  # type: ignore[arg-type]


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
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
    cursor: Cursor, name: str, alignment: int
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


def _check_overlap(cursor: Cursor, tensors: Mapping[str, GGUFTensor]) -> None:
    stop, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < stop:
            raise cursor.fail(tensor.name, f"its data overlaps that of {before}")
        stop, before = tensor.offset + tensor.nbytes, tensor.name
