"""Packed modules in the place of plain ones: as weights are read, afterwards, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastllm.nn.packed_matrix import PackedMatrix
from fastllm.nn.quant_embedding import QuantEmbedding
from fastllm.nn.quant_linear import QuantLinear
from fastllm.nn.quantize_model import dequantize_model
from fastllm.ops.quant_format import fit, format_of
from fastllm.quantize.fastllm_files import PARTS
from fastllm.quantize.packed import PackedWeight
from fastllm.quantize.packed_experts import PackedExperts
from fastllm.quantize.quantizer import Quantizer

from . import experts
from .quant_linear import EXPERT_PARTS, QuantExperts, meta_experts, meta_weight
from .quant_plan import embedding_name

_OWN = {torch.float32: "fp32"}  # what inputs are multiplied in; of other dtypes bf16


class Swap:
    """Puts packed modules into one model.

    activation: as `QuantConfig` has it; None: "int8" on the CPU, the weights' dtype on a GPU.
    """

    def __init__(self, model: PreTrainedModel, activation: str | None, on_gpu: bool) -> None:
        self.model = model
        self.activation = activation
        self.on_gpu = on_gpu
        self.shapes: dict[str, torch.Size] = {}  # of codes and scales that files must hold
        self._halves: dict[str, PackedExperts] = {}

    def mode(self, dtype: torch.dtype) -> str:
        """The activation of layers whose weights have that dtype."""
        if self.activation is not None:
            return self.activation
        return _OWN.get(dtype, "bf16") if self.on_gpu else "int8"

    # models whose files are quantized

    def put_empty(self, formats: dict[str, str], rows: int = 1) -> None:
        """Modules on meta for everything in `formats`; transformers fills them from the files.

        rows: side by side in the layout of what comes.

        Raises ValueError naming a module that the format does not fit, or that is none of ours.
        """
        halves: dict[str, dict[str, str]] = {}
        for name, format in formats.items():
            owner, _, part = name.rpartition(".")
            if part in EXPERT_PARTS and experts.is_experts(self.model.get_submodule(owner)):
                halves.setdefault(owner, {})[part] = format
                continue
            try:
                self._put_empty(name, format_of(format).name, rows)
            except ValueError as error:
                raise ValueError(f"{name}, {format} in config.json: {error}") from None
        for owner, parts in halves.items():
            self._put_empty_experts(owner, parts, rows)
        ends = ("_codes", "_scales")
        held = {name: p for name, p in self.model.named_parameters() if name.endswith(ends)}
        self.shapes = {name: parameter.shape for name, parameter in held.items()}
        self.model._keys_to_ignore_on_load_missing = {
            *(self.model._keys_to_ignore_on_load_missing or ()), r"weight_format$",
        }  # fmt: skip

    def _put_empty(self, name: str, format: str, rows: int) -> None:
        module = self.model.get_submodule(name)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise ValueError(f"a {type(module).__name__} is neither a linear layer nor a table")
        n, k = module.weight.shape
        self.put(name, meta_weight(format, n, k, rows), module.weight.dtype)

    def _put_empty_experts(self, owner: str, formats: dict[str, str], rows: int) -> None:
        module: Any = self.model.get_submodule(owner)
        missing = [part for part in EXPERT_PARTS if part not in formats]
        if missing:
            raise ValueError(f"{owner}.{missing[0]} is not quantized in config.json: both are")
        packs: list[PackedExperts] = []
        for part in EXPERT_PARTS:
            count, n, k = getattr(module, part).shape
            packs.append(meta_experts(format_of(formats[part]).name, count, n, k, rows))
        self._put_experts(owner, packs[0], packs[1], module.down_proj.dtype)

    # models that are rounded as they are read

    def round(self, name: str, weight: Tensor, format: str, work: Quantizer) -> None:
        """Replace the module of one weight, or keep it until its layer's experts are complete."""
        if weight.dim() == 2:
            self.put(name, work.pack(name, weight, format, weight.device), weight.dtype)
            return
        owner = name.rpartition(".")[0]
        count, n, k = weight.shape
        self._halves[name] = work.pack_experts(
            name, (count, n, k), weight.__getitem__, weight.device, "bf16"
        )
        names = [f"{owner}.{part}" for part in EXPERT_PARTS]
        if all(name in self._halves for name in names):
            packs = [self._halves.pop(name) for name in names]
            self._put_experts(owner, packs[0], packs[1], weight.dtype)

    def round_rest(self, formats: dict[str, str], work: Quantizer) -> None:
        """What was not in the files and has been initialized."""
        for name, format in formats.items():
            owner, _, part = name.rpartition(".")
            holder = self.model.get_submodule(owner)
            if part in EXPERT_PARTS and isinstance(holder, QuantExperts):
                continue
            module = getattr(holder, part)
            if type(module) is nn.Linear:
                self.round(name, module.weight.detach(), format, work)
            elif isinstance(module, nn.Parameter) and name not in self._halves:
                self.round(name, module.detach(), format, work)

    def round_embeddings(self, format: str, work: Quantizer) -> dict[str, str]:
        """The embedding table, and a head that shares it; the formats by name.

        Raises ValueError if no quantized format takes its rows.
        """
        table, name = self.model.get_input_embeddings(), embedding_name(self.model)
        if type(table) is not nn.Embedding:
            raise ValueError(f"embeddings: {name} is a {type(table).__name__}, no plain table")
        weight = table.weight.detach()
        given = fit(format, weight.shape[1])
        if format_of(given).dense:
            raise ValueError(f"embeddings: {format!r} does not fit rows of {weight.shape[1]}")
        packed = work.pack(name, weight, given, weight.device)
        self.put(name, packed, weight.dtype)
        return {name: given}

    # modules

    def put(self, name: str, packed: PackedWeight, dtype: torch.dtype) -> None:
        """Replace one module; a head that shares an embedding's table goes with it."""
        old = self.model.get_submodule(name)
        if isinstance(old, nn.Embedding):
            table = QuantEmbedding(packed, dtype, old.padding_idx)
            self._place(name, old, table)
            for head in tied_heads(self.model, name):
                self._put_head(head, table, packed, dtype)
            return
        assert isinstance(old, nn.Linear), "chosen as such"
        layer = QuantLinear.from_packed(packed, old.bias, self.mode(dtype), dtype)
        self._place(name, old, layer)

    def _put_head(
        self, name: str, table: QuantEmbedding, packed: PackedWeight, dtype: torch.dtype
    ) -> None:
        old = self.model.get_submodule(name)
        assert isinstance(old, nn.Linear), "a head"
        head = QuantLinear.from_packed(packed, old.bias, self.mode(dtype), dtype)
        head.weight_codes, head.weight_scales = table.weight_codes, table.weight_scales
        self._place(name, old, head)

    def _put_experts(
        self, owner: str, gate_up: PackedExperts, down: PackedExperts, dtype: torch.dtype
    ) -> None:
        old = self.model.get_submodule(owner)
        gating = experts.gating(old)
        assert gating is not None, "chosen as such"
        made = QuantExperts(old, gate_up, down, self.mode(dtype), gating, dtype)
        self._place(owner, old, made)

    def _place(self, name: str, old: nn.Module, new: nn.Module) -> None:
        new.train(old.training)
        if isinstance(new, QuantLinear | QuantExperts):  # adapters ask, see integrations/peft.py
            new.activation_is_default = self.activation is None  # type: ignore[assignment]
        new._is_hf_initialized = True  # type: ignore[assignment]  # nothing of it is drawn anew
        owner, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(owner), attribute, new)


def tied_heads(model: PreTrainedModel, table: str) -> list[str]:
    """Heads that share an embedding's table; the model's keys are then those of the codes."""
    keys: dict[str, str] = dict(model.all_tied_weights_keys)
    heads = [t.removesuffix(".weight") for t, s in keys.items() if s == f"{table}.weight"]
    for head in heads:
        del keys[f"{head}.weight"]
        for part in PARTS:
            keys[f"{head}.{part}"] = f"{table}.{part}"
    if heads:
        model.all_tied_weights_keys = keys
        model._tied_weights_keys = keys  # of this model, not of its class
    return heads


def was_read(parameter: Tensor) -> bool:
    """Whether transformers took a parameter from files, or from one that it shares."""
    return bool(getattr(parameter, "_is_hf_initialized", False)) and not parameter.is_meta


def check_bias(name: str, layer: QuantLinear) -> None:
    """Raises ValueError if the files had no bias for a layer that has one."""
    if layer.bias is not None and not was_read(layer.bias):
        raise ValueError(f"{name}.bias is missing from the files: the checkpoint is damaged")


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Plain modules of the dequantized values, in place; shared tables stay shared."""
    keys = {
        head.replace(".weight_codes", ".weight"): table.replace(".weight_codes", ".weight")
        for head, table in model.all_tied_weights_keys.items()
        if head.endswith(".weight_codes")
    }
    dequantize_model(model, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantEmbedding | QuantExperts):
            owner, _, attribute = name.rpartition(".")
            plain = module.dequantize()
            setattr(
                model.get_submodule(owner), attribute, plain if dtype is None else plain.to(dtype)
            )
    assert not any(isinstance(m, PackedMatrix) for m in model.modules()), "all were replaced"
    if keys:
        model.all_tied_weights_keys = keys
        model._tied_weights_keys = keys
        model.tie_weights(recompute_mapping=False)
