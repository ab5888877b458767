"""Models to files that others run: GGUF for llama.cpp, Hugging Face directories for transformers.

Weights come from a model file or from a live `Decoder`, one at a time. An adapter is merged here,
in float32 before the one rounding to the file's format, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastllm.errors import ModelFileError
from fastllm.models.adapters import WEIGHTS_FILE, Adapter
from fastllm.models.config import ModelConfig
from fastllm.models.config_to_gguf import config_metadata, gguf_architecture, rope_tensors
from fastllm.models.decoder import Decoder
from fastllm.models.expert_files import holds_experts, stacks, to_files
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.hf_layout import in_file_order
from fastllm.models.safetensors_files import save_directory
from fastllm.models.scorer import HEAD, with_head
from fastllm.models.stored_tensor import LazyTensor, StoredTensor
from fastllm.models.targets import check_apart, resolved
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_to_gguf import tokenizer_metadata
from fastllm.models.weights import GGUF_LAYER_NAMES, GGUF_MODEL_NAMES, WeightSource, half_split_rows
from fastllm.nn.linear import Linear
from fastllm.nn.lora import adapted
from fastllm.nn.moe import Experts
from fastllm.quantize.gguf_blocks import DENSE_DTYPES, QUANTIZED_FORMATS, quantize
from fastllm.quantize.packed import PackedWeight, unpack
from fastllm.quantize.packed_experts import unpack as unpack_experts

# llama.cpp's number of each kind of file
GGUF_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}
_LAYER = {hf: gguf for gguf, hf in GGUF_LAYER_NAMES.items()}
_TOP = {hf: gguf for gguf, hf in GGUF_MODEL_NAMES.items()}
_ROTATED = {
    "self_attn.q_proj": "num_attention_heads",
    "self_attn.k_proj": "num_key_value_heads",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """What is exported: `get(name)` gives a weight of `config.weight_shapes()` as it is stored."""

    config: ModelConfig
    get: Callable[[str], StoredTensor]
    path: Path | None = None  # of the files that are read

    def values(self, name: str) -> Tensor:
        """One weight in float32."""
        return self.get(name).to_float32()


def weights_of(source: Decoder | WeightSource, adapter: Adapter | None = None) -> Weights:
    """The weights of a model file or of a live model, adapters merged.

    Args:
        source: opened weights, or a model, whose own adapter is merged.
        adapter: an adapter from disk, merged too; a reward model's brings its scalar head.

    Raises:
        ModelFileError: if `adapter` was made for another model.
    """
    if adapter is not None and adapter.head is not None and not isinstance(source, Decoder):
        source = with_head(source)
    get = _decoder_getter(source) if isinstance(source, Decoder) else source.get
    path = None if isinstance(source, Decoder) else source.path
    if adapter is None:
        return Weights(source.config, get, path)
    _check_fits(adapter, source.config)

    def merged(name: str) -> StoredTensor:
        if name == HEAD and adapter.head is not None:
            return _dense(adapter.head.float())
        stored = get(name)
        delta = None
        if name.endswith(".weight"):
            delta = adapter.delta(name.removesuffix(".weight"))
        return stored if delta is None else _dense(stored.to_float32() + delta)

    return Weights(source.config, merged, path)


def _check_fits(adapter: Adapter, config: ModelConfig) -> None:
    shapes = config.weight_shapes()
    if adapter.head is not None and shapes.get(HEAD) != adapter.head.shape:
        raise ModelFileError(
            adapter.path / WEIGHTS_FILE, HEAD, "has no place in the model",
            "Give the adapter's own base model",
        )  # fmt: skip
    for layer, (a, b) in adapter.factors.items():
        if shapes.get(f"{layer}.weight") != (b.shape[0], a.shape[1]):
            raise ModelFileError(
                adapter.path / WEIGHTS_FILE,
                layer,
                f"was made for a layer of {b.shape[0]} x {a.shape[1]}, which the model does not "
                "have there",
                "Give the adapter's own base model",
            )


def _decoder_getter(model: Decoder) -> Callable[[str], StoredTensor]:
    """Weights of a live model: parameters, packed weights, members of fused ones."""
    groups = {
        f"{name}.{member}": (group, i)
        for name, group in model.parallel_linears()
        for i, member in enumerate(group.names)
    }
    low_ranks = {name: layer.low_rank for name, layer in adapted(model)}

    def get(name: str) -> StoredTensor:
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        own = getattr(module, kind)
        if own is not None:
            data = own.detach()
        else:
            packed = getattr(module, "packed", None)
            group, i = groups.get(owner, (None, 0))
            if isinstance(packed, PackedWeight):
                data = unpack(packed)
            elif isinstance(module, Experts):
                experts = module.packed(kind)
                assert experts is not None, "loaders fill weights"
                data = unpack_experts(experts)
            else:
                assert isinstance(module, Linear) and group is not None, "loaders fill weights"
                assert group.packed is not None, "a member without weight is served by its group"
                data = unpack(group.packed).split(group.sizes)[i]
        low_rank = low_ranks.get(owner) if kind == "weight" else None
        if low_rank is not None:
            data = data.float() + low_rank.delta()
        return _dense(data.cpu())

    return get


def _dense(data: Tensor) -> StoredTensor:
    format = next(name for name, dtype in DENSE_DTYPES.items() if dtype == data.dtype)
    return StoredTensor(format, tuple(data.shape), data)


def export_gguf(
    weights: Weights, path: str | os.PathLike[str], type: str, tokenizer: Tokenizer | None,
    *, name: str | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write a GGUF file: matrices in `type`, vectors in F32, tokenizer and chat template inside.

    A matrix that is stored in `type` already is copied as it is.

    Args:
        weights: from `weights_of`.
        path: the file; it appears whole or not at all.
        type: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1".
        tokenizer: a byte-level BPE; None: the file has token ids only, and fastllm alone reads it.
        name: what the file says the model is called.
        overwrite: replace a file that is there.

    Raises:
        ValueError: for a model, tokenizer or size that the format cannot express, or a `path` where
            the weights are read from.
        FileExistsError: if `path` exists and `overwrite` is false.
    """
    target = resolved(path)
    if type not in GGUF_TYPES:
        raise ValueError(f"type {type!r} is not one of {', '.join(GGUF_TYPES)}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; remove it, or give overwrite (--overwrite)")
    if target.is_dir():
        raise FileExistsError(f"{target} is a directory and is not replaced by a file")
    if weights.path is not None:
        check_apart(target, weights.path)
    config = weights.config
    quantized = type in QUANTIZED_FORMATS
    metadata = gguf_metadata(config, name or target.stem, GGUF_TYPES[type], tokenizer, quantized)
    tensors: dict[str, StoredTensor | LazyTensor] = {}
    tensors |= rope_tensors(config)
    for hf_name, shape in config.weight_shapes().items():
        if not holds_experts(hf_name):
            tensors[gguf_name(hf_name)] = _lazy(weights, hf_name, shape, type)
            continue
        parts = stacks(hf_name)
        rows = shape[1] // len(parts)
        for i, part in enumerate(parts):
            own, size = slice(i * rows, (i + 1) * rows), (shape[0], rows, shape[2])
            tensors[gguf_name(part)] = _lazy(weights, hf_name, size, type, own)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(target, metadata, tensors)


def gguf_metadata(
    config: ModelConfig, name: str, file_type: int, tokenizer: Tokenizer | None, quantized: bool
) -> dict[str, object]:
    """The metadata of a model's GGUF file.

    Args:
        name: what the file says the model is called.
        file_type: llama.cpp's number of the kind of file.
        tokenizer: a byte-level BPE; None: the file has token ids only.
        quantized: it holds quantized tensors.

    Raises:
        ValueError: for a model or tokenizer that the format cannot express.
    """
    metadata: dict[str, object] = config_metadata(config) | {"general.name": name}
    metadata["general.file_type"] = file_type
    if quantized:
        metadata["general.quantization_version"] = 2
    if tokenizer is not None:
        metadata |= tokenizer_metadata(tokenizer, config.vocab_size, config.eos_token_ids)
    elif config.bos_token_id is not None:
        metadata["tokenizer.ggml.bos_token_id"] = config.bos_token_id
    return metadata


def gguf_name(name: str) -> str:
    """A weight's GGUF name from its Hugging Face name."""
    stem, _, kind = name.rpartition(".")
    if name.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_LAYER[part]}.{kind}"
    return f"{_TOP[stem]}.{kind}"


def _lazy(
    weights: Weights, name: str, shape: tuple[int, ...], type: str, rows: slice | None = None
) -> LazyTensor:
    """rows: those of each expert that are meant, of a weight that holds experts."""
    router = name.endswith(".mlp.gate.weight")  # llama.cpp reads it as float32
    format = type if len(shape) > 1 and not router else "f32"
    if format in QUANTIZED_FORMATS and shape[-1] % 32:
        raise ValueError(
            f"{name} has rows of {shape[-1]} values, and {type} takes multiples of 32: export "
            "as f16 or bf16"
        )
    order = row_order(weights.config, name)

    def make() -> StoredTensor:
        stored = weights.get(name)
        if rows is not None:
            scales = None if stored.scales is None else stored.scales[:, rows]
            stored = replace(stored, shape=shape, data=stored.data[:, rows], scales=scales)
        if stored.format != format:
            stored = _converted(stored.to_float32(), format, name)
        return stored if order is None else replace(stored, data=stored.data[order])

    return LazyTensor(format, shape, make)


def _converted(values: Tensor, format: str, name: str) -> StoredTensor:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinity: the model is broken and is not exported")
    if format in QUANTIZED_FORMATS:
        data = quantize(format, values.contiguous())
    else:
        data = values.to(DENSE_DTYPES[format])
        if not bool(torch.isfinite(data).all()):
            raise ValueError(
                f"{name} holds values too large for {format} (up to "
                f"{values.abs().max().item():.4g}): export as bf16"
            )
    return StoredTensor(format, tuple(values.shape), data)


def row_order(config: ModelConfig, name: str) -> Tensor | None:
    """How architecture llama orders the rows of q and k: neighbours are rotated, not halves."""
    part = name.split(".", 3)[-1].rpartition(".")[0]
    if part not in _ROTATED or gguf_architecture(config) != "llama":
        return None
    heads = getattr(config, _ROTATED[part])
    return half_split_rows(heads, config.head_dim, config.rotary_dim).argsort()


def export_hf(
    weights: Weights, directory: str | os.PathLike[str], type: str, tokenizer: Tokenizer | None,
    *, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write a Hugging Face directory, which transformers, `LLM` and trainers load.

    Args:
        weights: from `weights_of`; quantized ones are dequantized.
        directory: it appears whole or not at all.
        type: "f32", "f16" or "bf16", of matrices and vectors.
        tokenizer: saved beside the weights.
        overwrite: replace a model's directory that is there.

    Raises:
        ValueError: for another type, values too large for it, or a `directory` where the weights
            are read from.
        FileExistsError: if the directory exists and `overwrite` is false, or it is no model's.
    """
    if weights.path is not None:
        check_apart(Path(directory), weights.path)
    if type not in DENSE_DTYPES:
        raise ValueError(
            f"a Hugging Face directory holds {', '.join(DENSE_DTYPES)}, not {type!r}: quantized "
            "formats go to GGUF"
        )
    config = replace(weights.config, dtype=DENSE_DTYPES[type])
    tensors = {}
    for name in config.weight_shapes():
        # who is chosen may hang on the last digit of a router's bias
        format = "f32" if name.endswith("e_score_correction_bias") else type
        values = in_file_order(weights.values(name), name, config)
        tensors[name] = _converted(values, format, name).data
    save_directory(directory, to_files(tensors, config), config.to_hf(), overwrite=overwrite)
    if tokenizer is not None:
        tokenizer.save(directory)
