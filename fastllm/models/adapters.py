"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT loads what is saved here, and what PEFT saved loads here, as far as it is plain LoRA. Files
are data: known keys, no pickle.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastllm.errors import ModelFileError
from fastllm.models.disk import sync
from fastllm.models.fields import MAX_CONFIG_BYTES, describe, read_json_object
from fastllm.models.safetensors_files import read_header
from fastllm.nn.lora import (
    ALL_LINEAR,
    LoraConfig,
    adapted,
    attach_all,
    lora_config,
    lora_parameters,
    target_layers,
)
from fastllm.nn.scalar_head import scalar_head

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = f"{_PREFIX}score.weight"  # a scalar head, which PEFT saves whole (modules_to_save)
_JUDGING_MODULES = ("score", "classifier")  # what PEFT names of a model that judges
_NAME = re.compile(r"(.{1,300})\.lora_([AB])\.weight")
_DTYPES = ("F32", "F16", "BF16")
# fields of PEFT's LoraConfig that change what an adapter computes, with the values that do not
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it was saved: factors (A `[r, in]`, B `[out, r]`) by layer name."""

    path: Path
    config: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]
    head: Tensor | None = None  # [1, hidden] of a scalar head

    def delta(self, layer: str) -> Tensor | None:
        """What the weight of `layer` gains when merged, float32 `[out, in]`; None: nothing."""
        if layer not in self.factors:
            return None
        a, b = self.factors[layer]
        return self.config.scale * (b.float() @ a.float())


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live factors of the model's adapter, and its scalar head, under the names that files
    have; empty without an adapter."""
    found: dict[str, Tensor] = {_PREFIX + name: p for name, p in lora_parameters(model).items()}
    head = scalar_head(model)
    if found and head is not None:
        found[_HEAD] = head.weight
    return found


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    base_name: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model's adapter; files that are there are replaced, each whole or not at all.

    Args:
        model: a model with an adapter (`fastllm.nn.lora.add_lora`).
        directory: made if it is not there.
        base_name: path or Hugging Face id of the base, kept for whoever loads the adapter.
        tensors: copies of `adapter_tensors(model)`, while training changes these; default they.

    Raises:
        ValueError: if the model has no adapter.
    """
    config = lora_config(model)
    if config is None:
        raise ValueError("the model has no adapter to save: add_lora makes one")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    live = adapter_tensors(model) if tensors is None else tensors
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in live.items()}
    text = json.dumps(_peft_config(model, config, base_name), indent=2, sort_keys=True) + "\n"
    _replace(target / WEIGHTS_FILE, lambda p: save_file(copies, p, metadata={"format": "pt"}))
    _replace(target / CONFIG_FILE, lambda p: p.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Any) -> None:
    """Write aside, flush, rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _peft_config(model: nn.Module, config: LoraConfig, base_name: str | None) -> dict[str, Any]:
    targets = config.target_modules
    if targets == ALL_LINEAR:
        targets = sorted({name.rpartition(".")[2] for name, _ in adapted(model)})
    judges = scalar_head(model) is not None
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if judges else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": ["score"] if judges else None,
    }


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Read and check an adapter's files.

    Raises:
        ModelFileError: naming the file, the field or tensor, and the remedy.
    """
    folder = Path(directory)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelFileError(
            path, "file", "does not exist", "Give the directory that an adapter was saved to"
        )
    values = read_json_object(path, MAX_CONFIG_BYTES)
    factors, head = _read_factors(folder / WEIGHTS_FILE)
    config = _read_config(values, path, tuple(dict.fromkeys(factors)), head is not None)
    for name, (a, b) in factors.items():
        if a.shape[0] != config.r or b.shape[1] != config.r:
            raise ModelFileError(
                folder / WEIGHTS_FILE,
                name,
                f"has factors {list(a.shape)} and {list(b.shape)}, the configuration says rank "
                f"{config.r}",
            )
    return Adapter(folder, config, factors, head)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> list[nn.Parameter]:
    """Freeze `model` and give it the adapter of a directory, to generate with or to train on.

    Returns:
        The adapter's parameters.

    Raises:
        ModelFileError: if files are missing or wrong, or made for another model.
        ValueError: if the model has an adapter already.
    """
    adapter = read_adapter(directory)
    head = scalar_head(model)
    _check_head(adapter, None if head is None else head.weight)
    layers = dict(target_layers(model, ALL_LINEAR))
    for name, (a, b) in adapter.factors.items():
        if name not in layers:
            raise ModelFileError(
                adapter.path / WEIGHTS_FILE,
                name,
                "the model has no such layer that can take an adapter",
                "Load the adapter on the model that it was made for",
            )
        sizes = (layers[name].out_features, layers[name].in_features)
        if (b.shape[0], a.shape[1]) != sizes:
            raise ModelFileError(
                adapter.path / WEIGHTS_FILE,
                name,
                f"was made for a layer of {b.shape[0]} x {a.shape[1]}, the model's is "
                f"{sizes[0]} x {sizes[1]}",
                "Load the adapter on the model that it was made for",
            )
    if head is not None and adapter.head is not None:
        with torch.no_grad():
            head.weight.copy_(adapter.head)
    return attach_all(model, adapter.config, adapter.factors)


def _check_head(adapter: Adapter, head: Tensor | None) -> None:
    """A reward model's adapter goes on a model with a scalar head, and no other does."""
    there = None if adapter.head is None else adapter.head.shape
    wanted = None if head is None else head.shape
    if there == wanted:
        return
    path, name = adapter.path / WEIGHTS_FILE, _HEAD.removeprefix(_PREFIX)
    if there is None:
        raise ModelFileError(path, name, "is missing", "Give the adapter of a reward model")
    if wanted is None:
        raise ModelFileError(
            path,
            name,
            "is a scalar head: the adapter judges, and a language model has no place for it",
            "Use it as a reward (model:DIR), or fastllm.models.scorer.load_scorer",
        )
    raise ModelFileError(path, name, f"is {list(there)}, the model's is {list(wanted)}")


def _read_factors(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor | None]:
    """(A, B) by layer, and the scalar head, as stored."""
    if not path.is_file():
        raise ModelFileError(
            path,
            "file",
            "does not exist",
            "Pickled adapters (.bin) are never read: save the adapter as safetensors",
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, entry in read_header(path).items():
        match = _NAME.fullmatch(name.removeprefix(_PREFIX))
        if name == _HEAD and len(entry.shape) == 2 and entry.dtype in _DTYPES:
            continue
        if not name.startswith(_PREFIX) or match is None:
            raise ModelFileError(
                path, name, "is no factor of a plain LoRA adapter of a linear layer"
            )
        if entry.dtype not in _DTYPES or len(entry.shape) != 2 or 0 in entry.shape:
            raise ModelFileError(
                path, name, f"is {entry.dtype} {list(entry.shape)}, not a matrix of floats"
            )
        found.setdefault(match[1], {})[match[2]] = torch.empty(0)
    tensors = load_file(path)
    for layer, pair in found.items():
        for factor in ("A", "B"):
            if factor not in pair:
                raise ModelFileError(path, f"{layer}.lora_{factor}.weight", "is missing")
            pair[factor] = tensors[f"{_PREFIX}{layer}.lora_{factor}.weight"]
            if not bool(torch.isfinite(pair[factor]).all()):
                raise ModelFileError(path, f"{layer}.lora_{factor}.weight", "holds NaN or infinity")
    if not found:
        raise ModelFileError(path, "header", "holds no tensors")
    head = tensors.get(_HEAD)
    if head is not None and not bool(torch.isfinite(head).all()):
        raise ModelFileError(path, _HEAD, "holds NaN or infinity")
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}, head


def _read_config(
    values: Mapping[str, Any], path: Path, layers: tuple[str, ...], judges: bool
) -> LoraConfig:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ModelFileError(path, "peft_type", f"{describe(kind)} is not supported, only LORA is")
    for name, neutral in _NEUTRAL.items():
        if not any(type(values.get(name)) is type(v) and values.get(name) == v for v in neutral):
            raise ModelFileError(
                path,
                name,
                f"{describe(values.get(name))} is not supported",
                "Merge the adapter with PEFT (merge_and_unload) and load the merged model",
            )
    whole = values.get("modules_to_save")
    judging = isinstance(whole, list) and all(name in _JUDGING_MODULES for name in whole)
    if whole not in (None, []) and not (judges and judging):
        raise ModelFileError(
            path,
            "modules_to_save",
            f"{describe(whole)} is not supported",
            "Merge the adapter with PEFT (merge_and_unload) and load the merged model",
        )
    targets = values.get("target_modules")
    names = targets if isinstance(targets, list) and targets else list(layers)
    if not all(isinstance(name, str) for name in names):
        raise ModelFileError(path, "target_modules", "is not a list of names")
    try:
        return LoraConfig(
            r=_number(values, path, "r", int),
            alpha=_number(values, path, "lora_alpha", float),
            dropout=_number(values, path, "lora_dropout", float, 0.0),
            target_modules=tuple(names),
            rslora=bool(values.get("use_rslora", False)),
        )
    except ValueError as error:
        raise ModelFileError(path, "configuration", str(error)) from None


def _number(
    values: Mapping[str, Any], path: Path, name: str, kind: type, default: float | None = None
) -> Any:
    value = values.get(name, default)
    good = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not good or not math.isfinite(value):
        raise ModelFileError(path, name, f"is {describe(value)}, not a number")
    return kind(value)
