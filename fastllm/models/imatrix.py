"""llama.cpp's importance matrices: for each matrix the squares of its inputs, in a GGUF file.

general.type          "imatrix"
imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size    what was measured
NAME.in_sum2, NAME.counts    F32: the sum of x^2 of every input channel, and the tokens;
                             of experts [E, K] and [E, 1]; NAME is the tensor's GGUF name
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import holds_experts, stacks
from fastllm.models.gguf import GGUFFile
from fastllm.models.gguf_export import gguf_name
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.stored_tensor import StoredTensor


def save_imatrix(
    path: str | os.PathLike[str], sums: Mapping[str, tuple[Tensor, Tensor]],
    texts: Sequence[str], chunks: int, chunk_size: int,
) -> None:  # fmt: skip
    """Write what was measured.

    Args:
        path: the file; it appears whole or not at all.
        sums: by weight name: (sum of x^2 `[K]`, tokens `[1]`), or `[E, K]` and `[E]` of experts.
        texts: names of the calibration files.
        chunks: rows of tokens.
        chunk_size: tokens of each.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, (squares, counts) in sums.items():
        own = [gguf_name(part) for part in (stacks(name) if holds_experts(name) else [name])]
        rows = squares.reshape(-1, squares.shape[-1]).float()
        count = counts.reshape(-1, 1).float()
        for part in own:
            tensors[f"{part}.in_sum2"] = StoredTensor("f32", tuple(rows.shape), rows)
            tensors[f"{part}.counts"] = StoredTensor("f32", tuple(count.shape), count)
    metadata: dict[str, object] = {
        "general.type": "imatrix",
        "imatrix.datasets": list(texts),
        "imatrix.chunk_count": chunks,
        "imatrix.chunk_size": chunk_size,
    }
    write_gguf(path, metadata, tensors)


def read_imatrix(path: str | os.PathLike[str], config: ModelConfig) -> dict[str, Tensor]:
    """Mean x^2 of the inputs by weight name, float32 `[K]`, `[E, K]` of experts.

    Matrices that the file does not name are left out; an expert that no token came to has ones.

    Raises:
        ModelFileError: if it is no such file, or of another model.
    """
    file = GGUFFile.open(path)
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise ModelFileError(
            path, "general.type", f"is {kind!r:.80}, not 'imatrix'",
            "Make one with fastllm quantize --save-imatrix, or with llama-imatrix",
        )  # fmt: skip
    found = {}
    for name, shape in config.weight_shapes().items():
        part = stacks(name)[0] if holds_experts(name) else name
        own = _gguf_name(part)
        if own is not None and f"{own}.in_sum2" in file.tensors:
            values = _mean(file, Path(path), own, shape)
            found[name] = values if holds_experts(name) else values[0]
    if not found:
        raise ModelFileError(path, "tensors", "names none of the model's matrices")
    return found


def _gguf_name(name: str) -> str | None:
    """The name in GGUF files; None for weights that they do not know."""
    try:
        return gguf_name(name)
    except KeyError:
        return None


def _mean(file: GGUFFile, path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """[matrices, K]."""
    matrices = shape[0] if len(shape) == 3 else 1
    tensors = []
    for suffix, columns in (("in_sum2", shape[-1]), ("counts", 1)):
        key = f"{name}.{suffix}"
        tensor = file.tensors.get(key)
        if tensor is None or tensor.type_name != "F32":
            raise ModelFileError(path, key, "is not there as F32")
        values = tensor.data.view(torch.float32).clone()
        if values.numel() != matrices * columns:
            raise ModelFileError(
                path, key, f"has {values.numel()} values, the model's matrix {matrices * columns}",
                "Give the importance matrix of this model",
            )  # fmt: skip
        tensors.append(values.view(matrices, columns))
    squares, counts = tensors
    if not bool(torch.isfinite(squares).all()) or bool((squares < 0).any()):
        raise ModelFileError(path, f"{name}.in_sum2", "holds values that are no sums of squares")
    return torch.where(counts > 0, squares / counts.clamp(min=1), 1.0)
