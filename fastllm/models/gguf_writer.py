"""Writing GGUF v3 files: metadata from Python or numpy values, tensors as they are stored."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from fastllm.models.gguf import DEFAULT_ALIGNMENT, MAGIC
from fastllm.models.gguf_metadata import MetadataArray
from fastllm.models.stored_tensor import LazyTensor, StoredTensor
from fastllm.models.targets import resolved
from fastllm.quantize.gguf_blocks import TYPE_IDS

_NUMPY_TYPES = {
    "u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11,
    "f8": 12,
}  # fmt: skip
_INTEGER_CHOICES = ((4, "<I", 0, 1 << 32), (5, "<i", -(1 << 31), 1 << 31),
                    (10, "<Q", 0, 1 << 64), (11, "<q", -(1 << 63), 1 << 63))  # fmt: skip


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, object],
    tensors: Mapping[str, StoredTensor | LazyTensor],
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write a little-endian GGUF v3 file, aside first and then renamed into place.

    Of a symbolic link, what it leads to is replaced.
    Types of metadata: bool, int (uint32 or the next type that holds it), float (float32), str,
    numpy scalars and arrays (their own type), and flat sequences of one of those.
    Raises TypeError or ValueError for anything else.
    """
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"alignment must be a power of two from 8, got {alignment}")
    pairs = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT:
        pairs["general.alignment"] = alignment
    target = resolved(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            for chunk in _chunks(pairs, tensors, alignment):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error  # a full disk, mostly
    finally:
        aside.unlink(missing_ok=True)


def _chunks(
    metadata: Mapping[str, object], tensors: Mapping[str, StoredTensor | LazyTensor], alignment: int
) -> Iterator[bytes | memoryview]:
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string(key) + encode_value(key, value)
    offset = 0
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]
        header += _string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", TYPE_IDS[tensor.format], offset)
        offset += tensor.nbytes + -tensor.nbytes % alignment
    yield bytes(header) + bytes(-len(header) % alignment)
    for tensor in tensors.values():
        raw = tensor.data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield raw.numpy().data
        yield bytes(-tensor.nbytes % alignment)


def encode_value(key: str, value: object) -> bytes:
    """A metadata value: its type code and its bytes."""
    if isinstance(value, MetadataArray):
        value = value.tolist() if value and isinstance(value[0], str) else value.numpy()
    if isinstance(value, np.ndarray | np.generic):
        return _encode_numpy(key, value)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        code, pack = _integer_type(key, [value])
        return struct.pack("<I", code) + struct.pack(pack, value)
    if isinstance(value, Sequence):
        return struct.pack("<I", 9) + _encode_sequence(key, value)
    raise TypeError(f"metadata {key}: values of type {type(value).__name__} cannot be written")


def _encode_numpy(key: str, value: np.ndarray | np.generic) -> bytes:
    kind = value.dtype.str.lstrip("<>|=")
    if kind not in _NUMPY_TYPES or value.ndim > 1:
        raise TypeError(f"metadata {key}: arrays of {value.dtype} and {value.ndim} dimensions")
    raw = np.asarray(value).astype(value.dtype.newbyteorder("<")).tobytes()
    if value.ndim == 0:
        return struct.pack("<I", _NUMPY_TYPES[kind]) + raw
    return struct.pack("<IIQ", 9, _NUMPY_TYPES[kind], value.size) + raw


def _encode_sequence(key: str, values: Sequence[object]) -> bytes:
    kinds = {type(v) for v in values}
    if kinds <= {str}:
        body = b"".join(_string(str(v)) for v in values)
        return struct.pack("<IQ", 8, len(values)) + body
    if kinds == {int}:
        integers = [v for v in values if isinstance(v, int)]
        code, pack = _integer_type(key, integers)
        body = struct.pack(f"<{len(integers)}{pack[1]}", *integers)
        return struct.pack("<IQ", code, len(integers)) + body
    for kind, code, letter in ((bool, 7, "?"), (float, 6, "f")):
        if kinds == {kind}:
            return struct.pack("<IQ", code, len(values)) + struct.pack(
                f"<{len(values)}{letter}", *values
            )
    raise TypeError(f"metadata {key}: a list must hold one type of str, int, float or bool")


def _integer_type(key: str, values: Sequence[int]) -> tuple[int, str]:
    for code, pack, low, stop in _INTEGER_CHOICES:
        if all(low <= v < stop for v in values):
            return code, pack
    raise ValueError(f"metadata {key}: integers outside the range of 64 bits")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
