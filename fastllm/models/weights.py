"""Weights of a model under Hugging Face names, from a Hugging Face directory or a GGUF file.

Quantized tensors stay packed. GGUF files of architecture `llama` hold the rows of Q and K in the
order that rotates neighbours (0, 1), (2, 3), ...; they come out of here in Hugging Face's
half-split order (0, R/2), (1, R/2 + 1), ... Reordering rows never touches a block, because blocks
run along columns.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.config_gguf import ROPE_TENSORS
from fastllm.models.expert_files import (
    file_name,
    holds_experts,
    members,
    stacked_shapes,
    stacks,
    stored_shapes,
    usual_name,
)
from fastllm.models.gguf import GGUFFile, GGUFTensor
from fastllm.models.mla_config import half_split_index
from fastllm.models.quantized_files import QuantizedFiles, open_directory
from fastllm.models.safetensors_files import SafetensorsFiles
from fastllm.models.stored_tensor import StoredTensor, joined, stacked
from fastllm.quantize.gguf_blocks import DENSE_DTYPES, SUPPORTED_FORMATS, row_bytes

GGUF_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_GGUF_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.([a-z_]+)\.(weight|bias)")
_GGUF_TOP = re.compile(r"([a-z_]+)\.(weight|bias)")


class WeightSource(Protocol):
    """What a model is loaded from. `names` are those of `config.weight_shapes()`."""

    config: ModelConfig
    path: Path
    names: tuple[str, ...]

    def format(self, name: str) -> str:
        """The format of a weight, or of what it is put together from, without reading it."""

    def get(self, name: str) -> StoredTensor:
        """One weight as it is stored. KeyError for a name that is not in `names`.

        The experts of a layer come out as one tensor, which may be a copy of them all.
        """

    def get_expert(self, name: str, expert: int) -> StoredTensor:
        """The matrix of one expert in the weight `name` [experts, rows, columns]."""

    def release(self, name: str | None = None) -> None:
        """Give back the pages of one weight, or of all, after they have been packed."""


def open_weights(path: str | os.PathLike[str]) -> GGUFWeights | SafetensorsWeights:
    """Open a GGUF file or a Hugging Face directory; names, shapes and formats are checked.

    Raises ModelFileError naming file, tensor or key, and the remedy.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").exists():
            raise ModelFileError(
                path, "config.json", "is not in the directory", f"Give the GGUF file: {files[0]}"
            )
        return SafetensorsWeights(path)
    return GGUFWeights(GGUFFile.open(path))


class SafetensorsWeights:
    """Weights of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.files = open_directory(directory)
        self.config = ModelConfig.from_directory(directory)
        self._shapes = self.config.weight_shapes()
        if isinstance(self.files, QuantizedFiles):
            own = {file_name(name, self.config) for name in self._shapes}
            self.files.drop_empty_biases(own)
            _warn_of_expanded(directory, self.files)
        self.names = tuple(self._shapes)
        self._stored = _usual_names(directory, self.files, self.config)
        expected = stored_shapes(self.config, self._stored)
        found = {name: self.files.entries[own].shape for name, own in self._stored.items()}
        _check_names(
            directory, expected, found, self._stored, partial(file_name, config=self.config)
        )

    def format(self, name: str) -> str:
        if name not in self._stored and name in self._shapes:
            name = members(name, 0)[0]
        return self.files.entries[self._stored[name]].dtype.lower()

    def get(self, name: str) -> StoredTensor:
        if name not in self._stored and name in self._shapes:  # experts, matrix by matrix
            count = self._shapes[name][0]
            return stacked([self.get_expert(name, i) for i in range(count)])
        stored, mla = self.files.get(self._stored[name]), self.config.mla
        index = None
        if mla is not None:
            index = half_split_index(mla, self.config.num_attention_heads, name)
        return stored if index is None else stored[index]

    def get_expert(self, name: str, expert: int) -> StoredTensor:
        if name in self._stored:
            return self.files.get(self._stored[name])[expert]
        return joined([self.files.get(self._stored[part]) for part in members(name, expert)])

    def release(self, name: str | None = None) -> None:
        # The library maps whole files, so one tensor's pages cannot be named: all go after what is
        # most of a layer.
        if name is None or holds_experts(name):
            self.files.release()


def _warn_of_expanded(directory: Path, files: QuantizedFiles) -> None:
    names = files.expanded
    if names:
        warnings.warn(
            f"{directory}: {len(names)} matrices, {names[0]} first, have their columns in groups "
            "out of order (act-order, desc_act=True), for which there are no kernels: they are "
            "served dequantized, in four times the memory. A checkpoint made with desc_act=False, "
            "or `fastllm quantize` on the unquantized model, stays small",
            stacklevel=4,
        )


def _usual_names(
    directory: Path, files: SafetensorsFiles | QuantizedFiles, config: ModelConfig
) -> dict[str, str]:
    """The names in the files of the tensors that belong to the model, by their usual names."""
    stored: dict[str, str] = {}
    for own in files.entries:
        name = usual_name(own, config)
        if _is_derived(name, config):
            continue
        if name in stored:
            raise ModelFileError(directory, own, f"is the same weight as {stored[name]}")
        stored[name] = own
    return stored


def _is_derived(name: str, config: ModelConfig) -> bool:
    """Tensors that checkpoints carry although they follow from others, or are not of the model."""
    tied = name == "lm_head.weight" and config.tie_word_embeddings
    return tied or name.endswith(".rotary_emb.inv_freq") or _predicts_ahead(name, config)


def _predicts_ahead(name: str, config: ModelConfig) -> bool:
    """Layers of DeepSeek-V3 behind the last one predict further tokens, for other decoders."""
    match = re.match(r"model\.layers\.([0-9]{1,5})\.", name)
    ahead = match is not None and int(match[1]) >= config.num_hidden_layers
    return ahead and config.model_type == "deepseek_v3"


class GGUFWeights:
    """Weights of a GGUF file."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.file = file
        self.config = ModelConfig.from_gguf(file.metadata, file.tensors, file.path)
        self.names = tuple(self.config.weight_shapes())
        self._tensors: dict[str, GGUFTensor] = {}
        for tensor in file.tensors.values():
            if tensor.name not in ROPE_TENSORS:
                self._tensors[self._hf_name(tensor)] = tensor
        found = {name: tensor.shape for name, tensor in self._tensors.items()}
        gguf_names = {hf: tensor.name for hf, tensor in self._tensors.items()}
        _check_names(file.path, stacked_shapes(self.config), found, gguf_names)
        for tensor in self._tensors.values():
            _check_format(file.path, tensor)
        for name in filter(holds_experts, self.names):
            self._check_alike([self._tensors[part] for part in stacks(name)])
        self._half_split: dict[int, torch.Tensor] = {}

    def _check_alike(self, parts: list[GGUFTensor]) -> None:
        """Gate and up of an expert are one product."""
        for part in parts[1:]:
            if part.type_name != parts[0].type_name:
                raise ModelFileError(
                    self.path,
                    part.name,
                    f"is stored as {part.type_name}, and {parts[0].name} as {parts[0].type_name}",
                    "Use a file where both have one format (llama-quantize --pure makes one)",
                )

    def _hf_name(self, tensor: GGUFTensor) -> str:
        if match := _GGUF_LAYER.fullmatch(tensor.name):
            layer, stem, kind = match.groups()
            if stem in GGUF_LAYER_NAMES:
                return f"model.layers.{layer}.{GGUF_LAYER_NAMES[stem]}.{kind}"
        elif (match := _GGUF_TOP.fullmatch(tensor.name)) and match[1] in GGUF_MODEL_NAMES:
            return f"{GGUF_MODEL_NAMES[match[1]]}.{match[2]}"
        raise ModelFileError(
            self.path,
            tensor.name,
            "is not part of the decoder, and leaving it out would change the model",
            "Use a model whose layers are those of Llama, Mixtral, Qwen2, Qwen3 or OLMoE",
        )

    def format(self, name: str) -> str:
        part = stacks(name)[0] if holds_experts(name) else name
        return self._tensors[part].type_name.lower()

    def get(self, name: str) -> StoredTensor:
        if holds_experts(name):
            return joined([_stored(self._tensors[part]) for part in stacks(name)], 1)
        stored = _stored(self._tensors[name])
        if self.config.model_type not in ("llama", "mixtral"):  # architecture llama
            return stored
        if ".self_attn.q_proj." in name:
            return self._in_half_split_order(stored, self.config.num_attention_heads)
        if ".self_attn.k_proj." in name:
            return self._in_half_split_order(stored, self.config.num_key_value_heads)
        return stored

    def get_expert(self, name: str, expert: int) -> StoredTensor:
        return joined([_stored(self._tensors[part])[expert] for part in stacks(name)])

    def _in_half_split_order(self, stored: StoredTensor, heads: int) -> StoredTensor:
        if heads not in self._half_split:
            config = self.config
            self._half_split[heads] = half_split_rows(heads, config.head_dim, config.rotary_dim)
        return stored[self._half_split[heads]]

    def release(self, name: str | None = None) -> None:
        if name is None:
            self.file.release()
            return
        for part in stacks(name) if holds_experts(name) else [name]:
            self.file.release(self._tensors[part])


def half_split_rows(heads: int, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """int64 [heads * head_dim]: row i of the half-split order is this row of a llama GGUF."""
    within = torch.arange(head_dim)
    pairs = torch.arange(rotary_dim).view(rotary_dim // 2, 2)  # row 2j + half
    within[:rotary_dim] = pairs.t().reshape(-1)  # goes to half * R/2 + j
    return (torch.arange(heads).view(-1, 1) * head_dim + within).reshape(-1)


def _stored(tensor: GGUFTensor) -> StoredTensor:
    format = tensor.type_name.lower()
    if format in DENSE_DTYPES:
        return StoredTensor(
            format, tensor.shape, tensor.data.view(DENSE_DTYPES[format]).view(tensor.shape)
        )
    width = row_bytes(format, tensor.shape[-1])
    return StoredTensor(format, tensor.shape, tensor.data.view(*tensor.shape[:-1], width))


def _check_format(path: Path, tensor: GGUFTensor) -> None:
    format = tensor.type_name.lower()
    if format not in SUPPORTED_FORMATS:
        raise ModelFileError(
            path,
            tensor.name,
            f"is stored as {tensor.type_name}, for which there are no kernels",
            f"Use a file with {', '.join(f.upper() for f in SUPPORTED_FORMATS)}, for example one "
            "made with llama.cpp's llama-quantize FILE OUT Q4_1 --pure",
        )
    if len(tensor.shape) == 1 and format not in DENSE_DTYPES:
        raise ModelFileError(
            path, tensor.name, f"is a vector stored as {tensor.type_name}", "Store it as F32"
        )


def _check_names(
    path: Path,
    expected: Iterable[tuple[str, tuple[int, ...]]],
    found: Mapping[str, tuple[int, ...]],
    file_names: Mapping[str, str],
    spell: Callable[[str], str] = str,
) -> None:
    """Every weight there, with the shape that the configuration gives it, and nothing else.

    spell: what files call a weight that they do not hold.
    """
    known = set()  # ends at the first that is missing: no larger than the files are
    for name, shape in expected:
        if name not in found:
            raise ModelFileError(path, spell(name), "the weight is missing from the file")
        if found[name] != shape:
            raise ModelFileError(
                path,
                file_names.get(name, name),
                f"has shape {list(found[name])}, the configuration says {list(shape)}",
            )
        known.add(name)
    for name in found:
        if name not in known:
            raise ModelFileError(
                path,
                file_names.get(name, name),
                "is not a weight of the configured model, and leaving it out would change it",
            )
