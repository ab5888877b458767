"""Where a quantization keeps what it has finished, so that a killed one goes on from there.

    .NAME.quantizing/   beside the file or directory NAME that is being made
      identity.json     what must be the same for it to be gone on with
      top.safetensors, layer-0000.safetensors, ...    finished parts, under their final names
      states.safetensors    the residual stream after the last finished layer

Every file is written aside, flushed and renamed: it is there whole or not at all. One that others
cut short is found when the folder is opened, deleted, and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastllm.models.disk import sync


@dataclass(frozen=True, slots=True)
class Part:
    """Finished tensors: bytes or numbers by final name, and what else is to be remembered."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


class WorkFolder:
    """Opened for a target; empty if there was none, or one of something else."""

    def __init__(self, target: Path, identity: Mapping[str, Any]) -> None:
        self.path = target.with_name(f".{target.name}.quantizing")
        text = json.dumps(identity, indent=1, sort_keys=True).encode()
        file = self.path / "identity.json"
        self.found = file.is_file() and file.read_bytes() == text
        self.set_aside = self.path.exists() and not self.found
        if not self.found:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            file.write_bytes(text)
        self.damaged = self._delete_damaged()

    def _delete_damaged(self) -> list[Path]:
        """Files that cannot be read: they are gone now."""
        damaged = []
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                self.read(file.stem)
            except (SafetensorError, ValueError, KeyError, TypeError):
                file.unlink()
                damaged.append(file)
        return damaged

    def finished(self, name: str) -> bool:
        """Whether a part is there."""
        return self._file(name).is_file()

    def read(self, name: str) -> Part:
        """A finished part, its tensors mapped."""
        with safe_open(self._file(name), framework="pt") as file:
            notes = json.loads(file.metadata()["notes"])
            return Part({key: file.get_tensor(key) for key in file.keys()}, notes)

    def read_one(self, name: str, key: str) -> Tensor:
        """One tensor of a finished part, mapped."""
        with safe_open(self._file(name), framework="pt") as file:
            return file.get_tensor(key)

    def write(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a part. Raises OSError if the disk is full or gone: earlier parts stay."""
        file = self._file(name)
        aside = file.with_suffix(".part")
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        try:
            save_file(whole, aside, metadata={"notes": json.dumps(notes)})
            sync(aside)
            os.replace(aside, file)
            sync(self.path)
        except SafetensorError as error:  # while writing, its only errors are the system's
            raise OSError(f"{aside} could not be written: {error}") from error
        finally:
            aside.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Forget a finished part."""
        self._file(name).unlink()

    def remove(self) -> None:
        """Delete everything: the target is finished."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


def fingerprint(path: Path) -> list[list[Any]]:
    """Names, sizes and times of a model's files: that they are the same when work goes on."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return [[file.name, (found := file.stat()).st_size, found.st_mtime_ns] for file in files]


def digest(values: Tensor | None) -> str | None:
    """SHA-256 of calibration ids or importances."""
    if values is None:
        return None
    data = values.detach().cpu().contiguous()
    head = f"{data.dtype} {list(data.shape)}:".encode()
    return hashlib.sha256(head + data.view(torch.uint8).numpy().tobytes()).hexdigest()
