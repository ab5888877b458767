"""A teacher's likeliest ids at every learned token of a data set, computed once and kept on disk.

    top_k.json             format, k, temperature, teacher, shards with sizes and SHA-256
    shard-00000.safetensors, ...
        hashes  int64 [examples]     names an example by its tokens and mask
        counts  int64 [examples]     rows of each: its learned tokens
        ids     int32 [rows, k]      likeliest first
        logprobs  float32 [rows, k]  at the temperature, of all ids: what is left is 1 - sum exp
    tokenizer.json, ...    the teacher's: a student's is compared with it

Examples are found by their contents, so a run may hold out or order them otherwise than the run
that stored them. A shard is written aside, synced and renamed before top_k.json names it: a run
that is killed goes on after the last whole shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastllm.errors import DataError
from fastllm.models.disk import sha256_file, sync
from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data.masks import Example

FORMAT, VERSION = "fastllm-teacher-top-k", 1
INDEX = "top_k.json"
SHARD_ROWS = 1 << 16  # 32 MB of 64 ids each: what a kill can cost is less than a minute's work

_REMEDY = "Store them again (fastllm distill ... --store-top-k K --out DIR)"
Say = Callable[[str], None]
Rows = Callable[[Sequence[Example]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """What is stored: a store that is gone on with must share it."""

    teacher: str
    k: int
    temperature: float
    vocab_size: int  # ids that the log-probabilities are over
    data: str  # fingerprint of the examples, in order


def example_hash(example: Example) -> int:
    """64 bits that name tokens and mask."""
    digest = hashlib.blake2b(example.ids.tobytes(), digest_size=8)
    digest.update(np.packbits(example.trained).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def learned(example: Example) -> int:
    """Rows of an example."""
    return int(np.count_nonzero(example.trained[1:]))


class TopKWriter:
    """Writes a store, or goes on with one. Raises DataError if there is another one there."""

    def __init__(
        self, directory: str | os.PathLike[str], settings: StoreSettings, tokenizer: Tokenizer
    ) -> None:
        self.directory = Path(directory)
        self.settings = settings
        self._index = self._begin(tokenizer)

    @property
    def done(self) -> int:
        """Examples that are stored."""
        return sum(shard["examples"] for shard in self._index["shards"])

    def write(self, examples: Sequence[Example], rows: Rows, say: Say) -> None:
        """Store the examples that are not yet; rows: gives ids and log-probabilities `[R, k]`."""
        shards = list(_cut(examples))
        there = len(self._index["shards"])
        if there:
            say(f"{self.done} of {len(examples)} examples are stored already")
        for number in range(there, len(shards)):
            first, last = shards[number]
            self._write_shard(number, examples[first:last], *rows(examples[first:last]))
            say(f"stored {last} of {len(examples)} examples")
        self._index["complete"] = True
        self._write_index()

    def _begin(self, tokenizer: Tokenizer) -> dict[str, Any]:
        wanted = {name: getattr(self.settings, name) for name in StoreSettings.__slots__}
        path = self.directory / INDEX
        if path.exists():
            found = _read_index(path)
            for name, value in wanted.items():
                if found["settings"].get(name) != value:
                    raise DataError(
                        path, "", name,
                        f"is {found['settings'].get(name)!r:.80}, this run would store "
                        f"{value!r:.80}",
                        "Choose another folder (--out), or give the settings of before",
                    )  # fmt: skip
            return found
        self.directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(self.directory)
        self._index = {"format": FORMAT, "version": VERSION, "settings": wanted,
                       "complete": False, "shards": []}  # fmt: skip
        self._write_index()
        return self._index

    def _write_shard(
        self, number: int, examples: Sequence[Example], ids: Tensor, logprobs: Tensor
    ) -> None:
        counts = [learned(example) for example in examples]
        assert sum(counts) == len(ids) == len(logprobs), "a row for each learned token"
        tensors = {
            "hashes": torch.tensor([example_hash(example) for example in examples]),
            "counts": torch.tensor(counts, dtype=torch.int64),
            "ids": ids.to(torch.int32).contiguous(),
            "logprobs": logprobs.float().contiguous(),
        }
        file = self.directory / f"shard-{number:05d}.safetensors"
        aside = file.with_name(f".{file.name}.part")
        save_file(tensors, aside)
        aside.chmod((self.directory / INDEX).stat().st_mode)  # the library makes it private
        sync(aside)
        os.replace(aside, file)
        sync(self.directory)
        self._index["shards"].append({
            "file": file.name, "examples": len(examples), "rows": len(ids),
            "bytes": file.stat().st_size, "sha256": sha256_file(file),
        })  # fmt: skip
        self._write_index()

    def _write_index(self) -> None:
        path = self.directory / INDEX
        aside = path.with_name(f".{INDEX}.part")
        aside.write_text(json.dumps(self._index, indent=1) + "\n", encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
        sync(self.directory)


class TopKStore:
    """A store that is open for reading; rows are read from the shards when they are asked for."""

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        """Use `TopKStore.open`."""
        settings = index["settings"]
        self.directory = directory
        self.k: int = settings["k"]
        self.temperature: float = settings["temperature"]
        self.vocab_size: int = settings["vocab_size"]
        self.teacher: str = settings["teacher"]
        self.index = index
        self._shards: list[Any] = []
        self._places: dict[int, tuple[int, int, int]] = {}  # hash -> shard, first row, rows
        for number, shard in enumerate(index["shards"]):
            self._open_shard(number, directory / shard["file"], shard)

    @staticmethod
    def is_at(directory: str | os.PathLike[str]) -> bool:
        """Whether a directory is such a store, whole or not."""
        return (Path(directory) / INDEX).is_file()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> TopKStore:
        """Raises DataError naming the file that is missing, torn or unfinished."""
        path = Path(directory) / INDEX
        index = _read_index(path)
        if not index["complete"]:
            remedy = "Run the command that began it once more: it goes on where it ended"
            raise DataError(path, "", "", "the store is not complete", remedy)
        return cls(Path(directory), index)

    def verify(self) -> None:
        """Compare every shard's bytes with the index. Raises DataError."""
        for shard in self.index["shards"]:
            if sha256_file(self.directory / shard["file"]) != shard["sha256"]:
                problem = "its contents are not those that were written (SHA-256 differs)"
                raise DataError(self.directory / shard["file"], "", "", problem, _REMEDY)

    def check(self, examples: Sequence[Example]) -> None:
        """Raises DataError unless every example is stored, naming the first that is not."""
        missing = [e for e in examples if example_hash(e) not in self._places]
        if missing:
            raise DataError(
                missing[0].place, "", "",
                f"{len(missing)} of {len(examples)} examples are not in {self.directory}",
                "It was stored from other data, or with another template, tokenizer, --seq-len or "
                "--overlong",
            )  # fmt: skip

    def rows(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(ids int32, log-probabilities float32), `[learned tokens of the examples, k]`."""
        ids = [torch.empty(0, self.k, dtype=torch.int32)]
        logprobs = [torch.empty(0, self.k)]
        for example in examples:
            shard, first, count = self._places[example_hash(example)]
            file = self._shards[shard]
            ids.append(file.get_slice("ids")[first : first + count])
            logprobs.append(file.get_slice("logprobs")[first : first + count])
        return torch.cat(ids), torch.cat(logprobs)

    def _open_shard(self, number: int, path: Path, entry: dict[str, Any]) -> None:
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            have = "does not exist" if size is None else f"has {size} bytes"
            problem = f"{have}; {INDEX} says {entry['bytes']}: torn"
            raise DataError(path, "", "", problem, _REMEDY)
        try:
            file = safe_open(path, framework="pt")
            hashes, counts = file.get_tensor("hashes"), file.get_tensor("counts")
        except SafetensorError as error:
            raise DataError(path, "", "", f"not a shard: {error}", _REMEDY) from error
        self._shards.append(file)
        first = 0
        for name, count in zip(hashes.tolist(), counts.tolist(), strict=True):
            self._places[name] = number, first, count
            first += count


def _cut(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """[first, last) of each shard's examples."""
    first, rows = 0, 0
    for number, example in enumerate(examples):
        rows += learned(example)
        if rows >= SHARD_ROWS or number + 1 == len(examples):
            yield first, number + 1
            first, rows = number + 1, 0


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(path, "", "", "the file does not exist", _REMEDY)
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(path, "", "", f"not valid JSON: {error}", _REMEDY) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(path, "", "format", f"is not {FORMAT!r}", _REMEDY)
    if index.get("version") != VERSION:
        problem = f"is {index.get('version')!r}; this fastllm reads version {VERSION}"
        raise DataError(path, "", "version", problem, _REMEDY)
    wanted = {"settings": dict, "complete": bool, "shards": list}
    for name, kind in wanted.items():
        if not isinstance(index.get(name), kind):
            raise DataError(path, "", name, f"is not a {kind.__name__}", _REMEDY)
    settings = {"teacher": str, "k": int, "temperature": float, "vocab_size": int, "data": str}
    shard = {"file": str, "examples": int, "rows": int, "bytes": int, "sha256": str}
    _check_types(path, "settings", index["settings"], settings)
    for number, entry in enumerate(index["shards"]):
        _check_types(path, f"shards[{number}]", entry, shard)
    return index


def _check_types(path: Path, name: str, found: Any, wanted: dict[str, type]) -> None:
    for field, kind in wanted.items():
        value = found.get(field) if isinstance(found, dict) else None
        if type(value) is not kind:
            problem = f"is {value!r:.80}, not a {kind.__name__}"
            raise DataError(path, "", f"{name}.{field}", problem, _REMEDY)
