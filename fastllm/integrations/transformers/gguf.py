"""`load_gguf`: a GGUF file as a transformers model whose weights stay the file's blocks.

transformers' own loader makes numbers of all blocks. Here the class of the file's architecture is
filled with packed modules that hold the same codes as fastllm's engine, so a 4-bit file takes 4-bit
memory and its products are the engine's. To transformers the model is a quantized one: it trains
with adapters, saves as safetensors and dequantizes as others do.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastllm.errors import ModelFileError
from fastllm.models.expert_files import holds_experts
from fastllm.models.gguf import GGUFFile
from fastllm.models.loader import check_device, choose_compute, read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.stored_tensor import StoredTensor
from fastllm.models.weights import GGUFWeights
from fastllm.nn.packed_matrix import as_bytes
from fastllm.quantize.gguf_blocks import DENSE_DTYPES
from fastllm.quantize.packed import PackedWeight, pack
from fastllm.quantize.packed_experts import PackedExperts, empty_experts, pack_expert_

from . import quantizer
from .quant_config import QuantConfig
from .quant_linear import expert_bytes
from .versions import check_version

_EMBEDDING = "model.embed_tokens.weight"
_ROUTER = ".mlp.gate.weight"  # read as numbers


def load_gguf(
    path: str | os.PathLike[str], *, dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str | None = None, activation: str | None = None,
    packed_embeddings: bool = True, attn_implementation: str | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A transformers model from a GGUF file, its matrices packed as they are in the file.

    Args:
        path: a GGUF file, or a name that fastllm knows ("smollm2").
        dtype: of activations, norms and biases: bfloat16 or float32.
        device: "cpu" (default) or "cuda".
        activation: how inputs meet the codes, as of `QuantConfig`.
        packed_embeddings: keep the embedding table, and a head that shares it, packed too; else
            they are numbers in `dtype`.
        attn_implementation: as of `from_pretrained`; "fastllm" for our attention.

    Returns:
        The model for causal language modeling of the file's architecture, in evaluation mode, with
        the file's end tokens in its generation config. `fastllm.patch(model)` replaces the rest.

    Raises:
        ModelNotFoundError: if there is no such file or name.
        ModelFileError: naming file, tensor or key, if the file is damaged, or of an architecture or
            type that has no kernels.
        ValueError: on a dtype, device or activation that does not exist or does not fit.
    """
    check_version()
    source = _open(path)
    where = check_device(device)
    compute, _ = choose_compute(source, dtype, where, activation)
    quantizer.register()
    weights = dict(_weights(source, compute, where, packed_embeddings))
    config = transformers.AutoConfig.for_model(**source.config.to_hf())
    config.name_or_path = str(source.path)
    formats = {name: made.format for name, made in weights.items() if isinstance(made, _Packed)}
    if formats:
        asked = QuantConfig(None, formats=formats, activation=activation)
        config.quantization_config = {**asked.to_dict(), "in_device_layout": True}
    return _filled(config, weights, compute, where, attn_implementation)


def gguf_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template, as transformers' AutoTokenizer.

    Raises:
        ModelNotFoundError, ModelFileError: as `load_gguf`.
    """
    check_version()
    with tempfile.TemporaryDirectory() as folder:
        read_tokenizer(_open(path)).save(folder)
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.name_or_path = os.fspath(path)
    return tokenizer


def _open(path: str | os.PathLike[str]) -> GGUFWeights:
    file = resolve(path)
    if file.is_dir():
        raise ModelFileError(
            Path(file), "file", "is a directory, not a GGUF file",
            "Load it with AutoModelForCausalLM.from_pretrained(path, "
            "quantization_config=fastllm.QuantConfig('int4'))",
        )  # fmt: skip
    return GGUFWeights(GGUFFile.open(file))


def _filled(
    config: Any, weights: dict[str, _Packed | _Numbers], dtype: torch.dtype, device: torch.device,
    attention: str | None,
) -> PreTrainedModel:  # fmt: skip
    state: dict[str, Any] = {}
    for name, made in weights.items():
        if isinstance(made, _Packed):
            stem = name if holds_experts(name) else f"{name}.weight"
            state[f"{stem}_codes"], state[f"{stem}_scales"] = made.codes, made.scales
        else:
            state[name] = made
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if device.type != "cpu":
        options["device_map"] = {"": str(device)}
    kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, **options
    )
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    return model


def _weights(
    source: GGUFWeights, dtype: torch.dtype, device: torch.device, packed_embeddings: bool
) -> Iterator[tuple[str, _Packed | _Numbers]]:
    """Each weight of the model, to be read later; packed ones by the names of their modules."""
    plain = {_ROUTER} if packed_embeddings else {_ROUTER, _EMBEDDING}
    mixed = _mixed_experts(source)
    for name in source.names:
        quantized = source.format(name) not in DENSE_DTYPES
        if not quantized or name.endswith(tuple(plain)) or name in mixed:
            yield name, _Numbers(source, name, dtype)
        else:
            yield name.removesuffix(".weight"), _Packed(source, name, device)


def _mixed_experts(source: GGUFWeights) -> set[str]:
    """Tensors of experts of layers of which one tensor is dense: one product reads both."""
    owners: dict[str, list[str]] = {}
    for name in filter(holds_experts, source.names):
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name
        for names in owners.values()
        if any(source.format(name) in DENSE_DTYPES for name in names)
        for name in names
    }


class _Lazy:
    """A tensor that is read when transformers takes it, as of a safetensors file."""

    def __init__(self, make: Callable[[], Tensor], dtype: str) -> None:
        self._make, self._dtype = make, dtype

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return self._dtype

    def __getitem__(self, index: object) -> Tensor:
        return self._make()


class _Numbers(_Lazy):
    """A weight as numbers in the model's dtype."""

    def __init__(self, source: GGUFWeights, name: str, dtype: torch.dtype) -> None:
        super().__init__(self._read, "F32")
        self._source, self._name, self._to = source, name, dtype

    def _read(self) -> Tensor:
        stored = self._source.get(self._name)
        values = (stored.data if stored.dense else stored.to_float32()).to(self._to, copy=True)
        self._source.release(self._name)
        return values


class _Packed:
    """The codes and scales of one weight, packed once, when the first of them is taken."""

    def __init__(self, source: GGUFWeights, name: str, device: torch.device) -> None:
        self._source, self._name, self._device = source, name, device
        self._lock = threading.Lock()  # transformers reads in several threads
        self._parts: dict[str, Tensor] = {}
        self.format = source.format(name)
        self.codes = _Lazy(lambda: self._take("codes"), "U8")
        self.scales = _Lazy(lambda: self._take("scales"), "U8")

    def _take(self, part: str) -> Tensor:
        with self._lock:
            if not self._parts:
                self._parts = self._pack()
            return self._parts.pop(part)

    def _pack(self) -> dict[str, Tensor]:
        name = self._name
        packed: PackedWeight | PackedExperts
        if holds_experts(name):
            packed = self._pack_experts()
            parts = {"codes": expert_bytes(packed.data), "scales": expert_bytes(packed.scales)}
        else:
            stored = self._source.get(name)
            packed = pack(stored.format, stored.data, *_shape(stored), self._device)
            parts = {"codes": as_bytes(packed.data), "scales": as_bytes(packed.scales)}
        self._source.release(name)
        return parts

    def _pack_experts(self) -> PackedExperts:
        count, n, k = self._source.config.weight_shapes()[self._name]
        packed = empty_experts(self.format, count, n, k, self._device)
        for expert in range(count):
            pack_expert_(packed, expert, self._source.get_expert(self._name, expert).data)
        return packed


def _shape(stored: StoredTensor) -> tuple[int, int]:
    n, k = stored.shape
    return n, k
