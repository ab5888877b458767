"""Models from files and back: GGUF files and Hugging Face directories in, directories out.

Loading packs one weight at a time and gives the file's pages back, so that a loaded model is its
packed form and nothing else. Quantized weights stay as they are quantized.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastllm.errors import ModelFileError
from fastllm.models.decoder import Decoder
from fastllm.models.expert_files import to_files
from fastllm.models.hf_layout import hf_tensors
from fastllm.models.names import resolve
from fastllm.models.quantization import quant_rule
from fastllm.models.safetensors_files import save_directory
from fastllm.models.stored_tensor import StoredTensor, joined
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import GGUFWeights, WeightSource, open_weights
from fastllm.nn.linear import DenseLinear, Linear, ParallelLinear
from fastllm.nn.moe import Experts, Router
from fastllm.ops.pages import Arena
from fastllm.quantize.gguf_blocks import DENSE_DTYPES
from fastllm.quantize.packed import PackedWeight, concat, from_canonical, pack
from fastllm.quantize.packed_experts import (
    PackedExperts,
    empty_experts,
    pack_expert_,
    set_expert_,
)
from fastllm.quantize.quantizer import Quantizer
from fastllm.quantize.rule import QuantReport, QuantRule

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "f32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
ACTIVATIONS = ("int8", "bf16", "fp32")
_EMBEDDING = "model.embed_tokens.weight"


def load_model(
    path: str | os.PathLike[str] | WeightSource,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    activation: str | None = None,
    max_positions: int | None = None,
    quantization: str | QuantRule | None = None,
) -> Decoder:
    """A model for inference: packed weights alone, none of them trainable.

    Args:
        path: a GGUF file, a Hugging Face directory, a name that `resolve` knows, or opened weights.
        dtype: what blocks compute in: float32 or bfloat16. Default: bfloat16 for quantized files,
            else what config.json says (float16 becomes bfloat16), else bfloat16.
        device: "cpu" (default) or "cuda".
        activation: how inputs meet quantized weights: "int8", "bf16", "fp32". Default: "int8" on
            the CPU, `dtype` on a GPU. Dense weights know only their dtype. With "int8" inputs of
            fp8 weights become e4m3, one scale for 128 columns: as in the runtimes that such files
            are made for, and coarser than int8 (transformers rounds to e4m3 too, a scale a token).
        max_positions: the longest sequence; default that of the configuration.
        quantization: round the matrices of layers and experts to this format as they are read, one
            at a time: a name of `fastllm.ops.quant_format`, a mix ("q4_k_m"), or a rule of one's
            own. Values that are quantized already are rounded once more. `model.quantization`
            tells what was done, and a FallbackWarning where rows do not fit the format.

    Raises:
        ModelNotFoundError, ModelFileError: naming file, tensor and remedy.
        ValueError: on a dtype, device, activation or format that does not exist or does not fit.
    """
    source = open_weights(resolve(path)) if isinstance(path, str | os.PathLike) else path
    where = check_device(device)
    rule = quantization
    if isinstance(rule, str):
        rule = quant_rule(rule, source.config)
    compute, mode = choose_compute(source, dtype, where, activation, rule is not None)
    model = Decoder(
        source.config,
        dtype=compute,
        activation=mode,
        max_positions=max_positions or source.config.max_position_embeddings,
        device=where,
    )
    _Loader(source, compute, where, rule).fill(model)
    return model.eval()


def check_device(device: torch.device | str | None) -> torch.device:
    """The device of that name. Raises ValueError if fastllm or this machine has none such."""
    name = "cpu" if device is None else str(device)
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {name!r:.80}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; use 'cpu'")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch sees {torch.cuda.device_count()} CUDA devices, got {name!r:.80}")
    return torch.device(name) if kind == "cuda" else torch.device("cpu")


def choose_compute(
    source: WeightSource, dtype: torch.dtype | str | None, device: torch.device,
    activation: str | None, quantizes: bool = False,
) -> tuple[torch.dtype, str]:  # fmt: skip
    """Compute dtype and activation mode of a load; see `load_model`.

    quantizes: weights are quantized as they are loaded.
    """
    quantized = quantizes or is_quantized(source)
    chosen = DTYPES.get(str(dtype).removeprefix("torch.")) if dtype is not None else None
    if dtype is not None and chosen is None:
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if chosen is None and activation in ("bf16", "fp32"):
        chosen = DTYPES[activation]
    if chosen is None:
        stored = None if quantized else source.config.dtype
        chosen = torch.float32 if stored == torch.float32 else torch.bfloat16
    own = "bf16" if chosen == torch.bfloat16 else "fp32"
    if activation is None:
        return chosen, "int8" if quantized and device.type == "cpu" else own
    if activation == "int8" and not quantized:
        raise ValueError("activation 'int8' needs quantized weights, and this model has none")
    if activation not in ("int8", own):
        raise ValueError(
            f"activation {activation!r} does not fit dtype {chosen}: use 'int8' or {own!r}"
        )
    return chosen, activation


def is_quantized(source: WeightSource) -> bool:
    """Whether weights of a model are stored in a quantized format."""
    return any(source.format(name) not in DENSE_DTYPES for name in source.names)


class _Loader:
    """Fills a decoder's modules, in the order of the forward pass, from one source."""

    def __init__(
        self, source: WeightSource, dtype: torch.dtype, device: torch.device,
        rule: QuantRule | None = None,
    ) -> None:  # fmt: skip
        self.source = source
        self.dtype = dtype
        self.dense = "bf16" if dtype == torch.bfloat16 else "f32"
        self.device = device
        self.arena = Arena()
        self.quantizer = None if rule is None else Quantizer(rule)

    def fill(self, model: Decoder) -> None:
        body = model.model
        body.embed_tokens.packed = self._pack([_EMBEDDING])[0]
        body.embed_tokens.weight = None
        for name, group in model.parallel_linears():
            self._fill_group(group, [f"{name}.{member}" for member in group.names])
        for name, module in model.named_modules():
            if isinstance(module, DenseLinear):
                module.weight = self._matrix(f"{name}.weight")
            elif isinstance(module, Linear) and module.weight is not None and module.packed is None:
                self._fill_linear(module, name, body.embed_tokens.packed)
            elif isinstance(module, Experts):
                self._fill_experts(module, name)
        self._fill_vectors(model)
        self.source.release()
        if self.quantizer is not None:
            model.quantization = self._report(model, self.quantizer.report)

    def _report(self, model: Decoder, report: QuantReport) -> QuantReport:
        """With sizes; warns of formats that did not fit."""
        if not report.layers:
            raise ValueError(f"no layer of {self.source.path} is quantized to {report.format}")
        shapes = self.source.config.weight_shapes().values()
        report.bytes_before = sum(torch.Size(s).numel() for s in shapes) * self.dtype.itemsize
        report.bytes_after = model.nbytes
        report.warn()
        return report

    def _fill_group(self, group: ParallelLinear, names: Sequence[str]) -> None:
        for member, name in zip(group.members, names, strict=True):
            self._fill_bias(member, name)
        packs = self._pack([f"{name}.weight" for name in names])
        if len(packs) == 1:
            group.set_packed(packs[0])
        for i, member in enumerate(group.members):
            member.weight = None
            member.packed = packs[i] if len(packs) > 1 else None

    def _fill_linear(self, linear: Linear, name: str, embedding: PackedWeight) -> None:
        self._fill_bias(linear, name)
        tied = name == "lm_head" and self.source.config.tie_word_embeddings
        linear.packed = embedding if tied else self._pack([f"{name}.weight"])[0]
        linear.weight = None

    def _fill_experts(self, experts: Experts, name: str) -> None:
        """Packed one by one, so that no layer's experts are there twice."""
        experts.packed_gate_up = self._pack_experts(f"{name}.gate_up_proj", experts.count)
        experts.packed_down = self._pack_experts(f"{name}.down_proj", experts.count)
        experts.gate_up_proj = experts.down_proj = None

    def _pack_experts(self, name: str, count: int) -> PackedExperts:
        first = self.source.get_expert(name, 0)
        format, (n, k) = self._format(first), first.shape
        if self.quantizer is not None:
            packed = self.quantizer.pack_experts(
                name, (count, n, k), lambda e: _values(self.source.get_expert(name, e)),
                self.device, self.dense, self.arena,
            )  # fmt: skip
            self.source.release(name)
            return packed
        packed = empty_experts(format, count, n, k, self.device, self.arena)
        for expert in range(count):
            self._pack_expert(packed, expert, self.source.get_expert(name, expert), name)
        self.source.release(name)
        return packed

    def _pack_expert(
        self, packed: PackedExperts, expert: int, stored: StoredTensor, name: str
    ) -> None:
        if self._format(stored) != packed.format:
            raise ModelFileError(
                self.source.path,
                name,
                f"expert {expert} is stored as {stored.format}, expert 0 as {packed.format}",
                "Use a checkpoint whose experts have one format",
            )
        if stored.scales is None:
            pack_expert_(packed, expert, stored.data)
        else:
            set_expert_(packed, expert, self._as_stored(stored.format, stored))

    def _fill_bias(self, linear: Linear, name: str) -> None:
        if linear.bias is not None:
            linear.bias = self._vector(f"{name}.bias")

    def _fill_vectors(self, model: Decoder) -> None:
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, self._vector(name))
        for name, module in model.named_modules():
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                bias = self._vector(f"{name}.e_score_correction_bias")
                module.e_score_correction_bias = bias.detach().float()

    def _matrix(self, name: str) -> nn.Parameter:
        """A weight that is used as it lies, in the compute dtype; its numbers if quantized."""
        data = _values(self.source.get(name)).to(self.device, self.dtype, copy=True)
        self.source.release(name)
        return nn.Parameter(data, requires_grad=False)

    def _vector(self, name: str) -> nn.Parameter:
        """A norm's weight or a bias as it is stored; float16 becomes float32."""
        data = self.source.get(name).data
        kept = data.float() if data.dtype == torch.float16 else data.clone()
        return nn.Parameter(kept.to(self.device), requires_grad=False)

    def _pack(self, names: Sequence[str]) -> list[PackedWeight]:
        """One packed weight of all the rows if the formats are equal, else one of each."""
        stored = [self.source.get(name) for name in names]
        packs = self._quantized(names, stored)
        if packs:
            del stored
            self.source.release()  # a model is quantized to be small: its file need not stay mapped
            return packs
        packs = self._joined(stored)
        del stored
        for name in names:
            self.source.release(name)
        return packs

    def _joined(self, stored: Sequence[StoredTensor]) -> list[PackedWeight]:
        """As `_pack`, of weights that keep their formats."""
        formats = [self._format(s) for s in stored]
        if len({(f, s.data.dtype) for f, s in zip(formats, stored, strict=True)}) == 1:
            return [self._as_stored(formats[0], joined(stored))]
        return [self._as_stored(f, s) for f, s in zip(formats, stored, strict=True)]

    def _as_stored(self, format: str, stored: StoredTensor) -> PackedWeight:
        n, k = stored.shape
        if stored.scales is not None:
            parts = stored.data, stored.scales
            return from_canonical(format, *parts, n, k, self.device, self.arena)
        return pack(format, stored.data, n, k, self.device, self.arena)

    def _quantized(
        self, names: Sequence[str], stored: Sequence[StoredTensor]
    ) -> list[PackedWeight]:
        """As `_pack`, of weights some of which are to be quantized; empty: none is."""
        if self.quantizer is None or names[0] == _EMBEDDING:
            return []
        layers = [name.removesuffix(".weight") for name in names]
        chosen = [
            self.quantizer.format_for(layer, s.shape)
            for layer, s in zip(layers, stored, strict=True)
        ]
        if not any(chosen):
            return []
        packs = [
            self._as_stored(self._format(s), s) if format is None
            else self.quantizer.pack(layer, _values(s), format, self.device)
            for layer, s, format in zip(layers, stored, chosen, strict=True)
        ]  # fmt: skip
        return [concat(packs, self.arena)] if len({p.format for p in packs}) == 1 else packs

    def _format(self, stored: StoredTensor) -> str:
        return self.dense if stored.dense else stored.format


def _values(stored: StoredTensor) -> Tensor:
    """A weight as numbers."""
    return stored.data if stored.dense else stored.to_float32()


def read_tokenizer(source: WeightSource) -> Tokenizer:
    """The tokenizer of a model's files. Raises ModelFileError if they have none."""
    if isinstance(source, GGUFWeights):
        return Tokenizer.from_gguf(source.file.metadata, file=source.path)
    return Tokenizer.from_hf(source.path)


def save_pretrained(
    model: Decoder, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None,
    *, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write a Hugging Face directory that transformers and `load_model` read.

    Raises ValueError for quantized weights, which that format cannot hold, and FileExistsError if
    the directory exists and `overwrite` is false.
    """
    config = replace(model.config, dtype=model.dtype)
    tensors = to_files(hf_tensors(model), config)
    save_directory(directory, tensors, config.to_hf(), overwrite=overwrite)
    if tokenizer is not None:
        tokenizer.save(directory)
