"""Hugging Face model directories: weights in model.safetensors or in shards with an index.

Weights are read through the `safetensors` library, memory-mapped, one tensor at a time. Headers
and the index are checked here first, so that errors name the file and the tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastllm.errors import ModelFileError
from fastllm.models.disk import sync
from fastllm.models.fields import describe, parse_json_object, read_json_object
from fastllm.models.stored_tensor import StoredTensor
from fastllm.models.targets import check_replaceable, resolved
from fastllm.quantize.gguf_blocks import DENSE_DTYPES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 << 20  # the format allows 100 MB; 50,000 tensors in one file take 8 MiB
MAX_DIMS = 8
DEFAULT_SHARD_BYTES = 5 << 30
QUANTIZED_DTYPES = (
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn,
)  # fmt: skip

# bits per value of every dtype that a file may hold; only the first three can be loaded
_DTYPE_BITS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "I64": 64, "I32": 32, "I16": 16,
               "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
               "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
               "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """Where one tensor lies and what it is."""

    file: Path
    dtype: str  # "F32", "BF16", ...
    shape: tuple[int, ...]
    nbytes: int


class SafetensorsFiles:
    """The weights of one directory: `entries` by name; `get` maps them on demand."""

    def __init__(self, directory: Path, entries: Mapping[str, SafetensorsEntry]) -> None:
        self.directory = directory
        self.entries = entries
        self._handles: dict[Path, safe_open] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> SafetensorsFiles:
        """Read and check index and headers. Raises ModelFileError naming the file."""
        directory = Path(directory)
        if (directory / SINGLE_FILE).exists():
            return cls(directory, read_header(directory / SINGLE_FILE))
        if not (directory / INDEX_FILE).exists():
            raise ModelFileError(
                directory,
                SINGLE_FILE,
                f"neither {SINGLE_FILE} nor {INDEX_FILE} is in the directory",
                "Pickled weights (.bin, .pt) are never read: save the model as safetensors",
            )
        return cls(directory, _read_shards(directory))

    def get(self, name: str) -> StoredTensor:
        """One tensor, a view of the mapped file. KeyError for an unknown name."""
        entry = self.entries[name]
        format = entry.dtype.lower()
        if format not in DENSE_DTYPES:
            raise ModelFileError(
                entry.file,
                name,
                f"has dtype {entry.dtype}, which is not supported",
                "Supported: F32, F16, BF16; and quantized weights of which config.json tells the "
                "method in quantization_config",
            )
        data = self.tensor(name)
        if data.dtype != DENSE_DTYPES[format]:
            raise ModelFileError(entry.file, name, "changed while it was being read")
        return StoredTensor(format, entry.shape, data)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of any dtype, a view of the mapped file. KeyError for an unknown name."""
        entry = self.entries[name]
        try:
            data = self._handle(entry.file).get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ModelFileError(entry.file, name, f"cannot be read: {error}") from error
        if tuple(data.shape) != entry.shape:
            raise ModelFileError(entry.file, name, "changed while it was being read")
        return data

    def release(self) -> None:
        """Let go of the maps; pages go when the last view does. `get` opens files again."""
        self._handles.clear()

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt", device="cpu")
        return self._handles[file]


def _read_shards(directory: Path) -> dict[str, SafetensorsEntry]:
    index = directory / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(index, "weight_map", f"must be an object, is {describe(weight_map)}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise ModelFileError(
                index,
                f"weight_map.{name:.200}",
                f"{describe(file)} is not the name of a .safetensors file of the directory",
            )
    entries: dict[str, SafetensorsEntry] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in read_header(directory / file).items():
            if weight_map.get(name) != file:
                raise ModelFileError(
                    directory / file,
                    name,
                    f"is in this shard, but {INDEX_FILE} puts it in "
                    f"{describe(weight_map.get(name))}",
                )
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise ModelFileError(directory / file, name, f"{INDEX_FILE} puts it here: not found")
    return entries


def _is_plain_name(file: str) -> bool:
    """No folder, no drive, nothing hidden: the index cannot lead outside its directory."""
    return (
        file.endswith(".safetensors")
        and len(file) <= 255
        and not file.startswith(".")
        and not any(c in file for c in '/\\:\0"')
    )


def read_header(file: Path) -> dict[str, SafetensorsEntry]:
    """Check the header of one file against its size. Raises ModelFileError."""
    try:
        if not file.is_file():
            raise ModelFileError(file, "file", "does not exist or is not a regular file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 10 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelFileError(
                    file,
                    "header",
                    f"claims {length} bytes in a file of {size}",
                    "The file is truncated or damaged: download it again",
                )
            header = parse_json_object(stream.read(length), file, "header")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelFileError(file, "file", f"cannot be read: {reason}") from error
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, info in header.items():
        entries[name], span = _read_entry(file, name, info)
        spans.append((*span, name))
    stop = 0
    for start, end, name in sorted(spans):
        if start != stop:
            raise ModelFileError(file, name, f"starts at byte {start}, expected at {stop}")
        stop = end
    if stop != size - 8 - length:
        raise ModelFileError(
            file,
            "header",
            f"describes {stop} bytes of tensors, the file has {size - 8 - length}",
            "The file is truncated or damaged: download it again",
        )
    return entries


def _read_entry(file: Path, name: str, info: object) -> tuple[SafetensorsEntry, tuple[int, int]]:
    if not isinstance(info, dict):
        raise ModelFileError(file, name, f"must be described by an object, is {describe(info)}")
    dtype, shape, span = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ModelFileError(file, name, f"has the unknown dtype {describe(dtype)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise ModelFileError(file, name, f"its shape is not a list of at most {MAX_DIMS} sizes")
    if not _is_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise ModelFileError(file, name, "its data_offsets are not two ascending offsets")
    bits = _DTYPE_BITS[dtype]
    for dim in shape:
        bits *= dim
    nbytes = span[1] - span[0]
    if bits != 8 * nbytes:
        raise ModelFileError(
            file, name, f"a {dtype} tensor of shape {shape!s:.100} does not take {nbytes} bytes"
        )
    return SafetensorsEntry(file, dtype, tuple(shape), nbytes), (span[0], span[1])


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62 for v in value
    )


def save_directory(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    quantized: bool = False,
) -> None:
    """Write a Hugging Face model directory that transformers loads.

    tensors: float32, float16 or bfloat16, by Hugging Face name; with `quantized` integers and
    float8 too. config: the object for config.json.
    files: further files by name, for example {"tokenizer.json": bytes}.
    overwrite: replace a model's directory that is there. Of a symbolic link, what it leads to.
    The directory is written aside, flushed to disk and renamed: it is there whole or not at all.
    Raises FileExistsError if `path` exists and `overwrite` is false, or it is a directory of
    something else than a model, ValueError or TypeError for tensors that cannot be stored.
    """
    target = resolved(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True to replace it")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file and is not replaced by a directory")
    if target.exists():
        check_replaceable(target)
    for name in files or {}:
        if Path(name).name != name or name in ("config.json", INDEX_FILE):
            raise ValueError(f"files: {name!r} is not a plain file name that is free")
    allowed = {*DENSE_DTYPES.values(), *(QUANTIZED_DTYPES if quantized else ())}
    shards = _plan_shards(tensors, max_shard_bytes, allowed)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        _write_shards(aside, tensors, shards)
        for name, content in (files or {}).items():
            (aside / name).write_bytes(content)
        text = json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False)
        (aside / "config.json").write_text(text + "\n", encoding="utf-8")
        mode = (aside / "config.json").stat().st_mode & 0o777
        for file in aside.iterdir():
            file.chmod(mode)  # the safetensors library makes its files private
            sync(file)
        sync(aside)
        aside.chmod(0o755)  # mkdtemp makes it private
        _swap(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; a directory that is already there is set aside, then removed."""
    old = aside.with_suffix(".old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(aside, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _plan_shards(
    tensors: Mapping[str, torch.Tensor], limit: int, allowed: Container[torch.dtype]
) -> list[list[str]]:
    """Names in order, cut where the next tensor would pass the limit."""
    if limit < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {limit}")
    shards: list[list[str]] = [[]]
    size, owners = 0, dict[int, str]()
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            raise TypeError(f"{name} has dtype {tensor.dtype}; float32, float16, bfloat16 can be")
        owner = owners.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if owner != name:
            raise ValueError(f"{name} and {owner} share memory; save one of them")
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_shards(
    directory: Path, tensors: Mapping[str, torch.Tensor], shards: list[list[str]]
) -> None:
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        part = {name: _own(tensors[name]) for name in names}
        save_file(part, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (directory / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, on the CPU, with a storage of its own, which is what the library can save."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    return tensor
