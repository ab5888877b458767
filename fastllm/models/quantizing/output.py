"""The finished parts of a quantization as one GGUF file or one Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.models.config import ModelConfig
from fastllm.models.config_to_gguf import rope_tensors
from fastllm.models.gguf_export import gguf_metadata
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.quantizing.work import WorkFolder
from fastllm.models.safetensors_files import save_directory
from fastllm.models.stored_tensor import LazyTensor, StoredTensor
from fastllm.models.tokenizer import Tokenizer
from fastllm.quantize.gguf_blocks import block_type
from fastllm.quantize.mixes import MIXES, Plan

_SHARD_BYTES = 1 << 30  # a shard is copied before it is written


def write_gguf_file(
    target: Path, config: ModelConfig, plan: Plan, work: WorkFolder, parts: Sequence[str],
    tokenizer: Tokenizer | None,
) -> None:  # fmt: skip
    """Write the parts as a GGUF file, one tensor in memory at a time."""
    metadata = gguf_metadata(config, target.stem, MIXES[plan.name].file_type, tokenizer, True)
    tensors: dict[str, StoredTensor | LazyTensor] = dict(rope_tensors(config))
    for part in parts:
        found = work.read(part)
        for name, format in found.notes["formats"].items():
            shape = _shape(found.tensors[name], format)
            tensors[name] = LazyTensor(format, shape, _reader(work, part, name, format, shape))
    write_gguf(target, metadata, tensors)


def _shape(data: Tensor, format: str) -> tuple[int, ...]:
    """Of the values, of GGUF blocks or dense data."""
    if data.dtype != torch.uint8:
        return tuple(data.shape)
    kind = block_type(format)
    return *data.shape[:-1], data.shape[-1] // kind.nbytes * kind.values


def _reader(
    work: WorkFolder, part: str, name: str, format: str, shape: tuple[int, ...]
) -> Callable[[], StoredTensor]:
    return lambda: StoredTensor(format, shape, work.read_one(part, name))


def write_directory(
    target: Path, config: ModelConfig, quantization: Mapping[str, Any], work: WorkFolder,
    parts: Sequence[str], tokenizer: Tokenizer | None, overwrite: bool,
) -> None:  # fmt: skip
    """Write the parts as a Hugging Face directory."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        found = work.read(part)
        tensors |= {name: found.tensors[name] for name in found.notes["formats"]}
    values = replace(config, dtype=config.dtype or torch.bfloat16).to_hf()
    save_directory(
        target, tensors, values | {"quantization_config": dict(quantization)},
        files=_tokenizer_files(tokenizer, work), overwrite=overwrite, quantized=True,
        max_shard_bytes=_SHARD_BYTES,
    )  # fmt: skip


def _tokenizer_files(tokenizer: Tokenizer | None, work: WorkFolder) -> dict[str, bytes]:
    """What a tokenizer writes, by file name: it belongs to what is renamed into place."""
    if tokenizer is None:
        return {}
    folder = work.path / "tokenizer"
    tokenizer.save(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}
