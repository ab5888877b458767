"""Which modules of a transformers model are quantized, and to what, before weights are read.

Names are those of modules (`model.layers.0.mlp.up_proj`); experts of a layer are two tensors
(`model.layers.0.mlp.experts.gate_up_proj`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fastllm.ops.quant_format import QUANT_FORMATS, format_of
from fastllm.quantize.mixes import MIXES, Sizes, plan
from fastllm.quantize.quantizer import Quantizer
from fastllm.quantize.rule import DEFAULT_SKIP, QuantRule

from . import experts
from .quant_config import QuantConfig
from .quant_linear import EXPERT_PARTS

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)", re.DOTALL)
_PLAIN = ("bf16", "f32")


def choose(model: PreTrainedModel, config: QuantConfig) -> tuple[Quantizer, dict[str, str]]:
    """The rounding that a config asks of a model, and the format of each module it takes.

    Args:
        model: its parameters may be on meta; nothing of it is changed.
        config: with a format.

    Returns:
        A `Quantizer`, whose report says what is left and why, and name -> format of linear layers
        and of the tensors of experts.

    Raises:
        ValueError: if nothing is chosen, naming what stayed plain.
    """
    shapes = dict(_shapes(model))
    quantizer = Quantizer(_rule(model, config, shapes), measure=False)
    stacked = [name for name, shape in shapes.items() if len(shape) == 3]
    _leave(model, config, quantizer, shapes, stacked)
    formats = {}
    for name, shape in shapes.items():
        format = quantizer.format_for(name, shape)
        if format is not None:
            formats[name] = format
    _keep_halves(quantizer, formats, stacked)
    if not formats:
        kept = "; ".join(f"{name}: {why}" for name, why in quantizer.report.kept[:3])
        raise ValueError(f"nothing of {type(model).__name__} is quantized ({kept})")
    return quantizer, formats


def _shapes(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Linear layers, and both tensors of every layer of experts that transformers stacks."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, tuple(module.weight.shape)
        elif experts.is_experts(module):
            for part in EXPERT_PARTS:
                tensor = getattr(module, part, None)
                if tensor is not None and tensor.dim() == 3:
                    yield f"{name}.{part}", tuple(tensor.shape)


def _rule(model: PreTrainedModel, config: QuantConfig, shapes: dict[str, Any]) -> QuantRule:
    assert config.format is not None, "quantized models have their formats"
    skip = DEFAULT_SKIP if config.modules_to_not_convert is None else ()
    mix = config.format.lower()
    raised: dict[str, str] = {}
    base, label = config.format, None
    if mix in MIXES and mix not in QUANT_FORMATS:
        base, label, raised = MIXES[mix].base, mix, _raised(model, mix, shapes)
    for name in shapes:
        format = _overridden(config, name)
        if format is not None and format not in _PLAIN:
            raised[name] = format
    if config.embeddings is not None:
        raised[embedding_name(model)] = format_of(config.embeddings).name
    return QuantRule(base, skip=skip, mix=label, raised=raised)


def _raised(model: PreTrainedModel, mix: str, shapes: dict[str, Any]) -> dict[str, str]:
    """What a mix of llama.cpp gives other formats than its base: its rules number the layers."""
    text: Any = model.config.get_text_config()
    usual = {}
    for name in shapes:
        match = _LAYER.fullmatch(name)
        if match is not None:
            usual[f"model.layers.{match[1]}.{match[2]}.weight"] = name
    heads = getattr(text, "num_attention_heads", 1)
    sizes = Sizes(
        layers=text.num_hidden_layers,
        experts=getattr(text, "num_local_experts", getattr(text, "num_experts", 0)) or 0,
        many_queries=getattr(text, "num_key_value_heads", heads) < heads,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )
    chosen = plan(mix, {w: shapes[name] for w, name in usual.items()}, sizes)
    wanted = {usual[w]: chosen.fallen.get(w, (f,))[0] for w, f in chosen.formats.items()}
    return {name: format for name, format in wanted.items() if format != MIXES[mix].base}


def _overridden(config: QuantConfig, name: str) -> str | None:
    for pattern, format in (config.overrides or {}).items():
        if re.search(pattern, name):
            return format_of(format).name
    return None


def _leave(
    model: PreTrainedModel, config: QuantConfig, quantizer: Quantizer, shapes: dict[str, Any],
    stacked: Sequence[str],
) -> None:  # fmt: skip
    """Note what stays plain whatever its format would be."""
    tied = {key.removesuffix(".weight") for key in _tied(model)}
    unconverted = HfQuantizer.get_modules_to_not_convert(
        model, config.modules_to_not_convert, list(model._keep_in_fp32_modules or ())
    )
    for name in shapes:
        reason = None
        if name in tied:
            reason = "shares its weight with another module"
        elif _overridden(config, name) in _PLAIN:
            reason = "overrides says so"
        elif not should_convert_module(name, unconverted):
            reason = "modules_to_not_convert says so"
        elif name in stacked:
            reason = _experts_reason(model, config, name)
        if reason is not None:
            quantizer.report.keep(name, reason)
            quantizer.leave.add(name)


def _tied(model: PreTrainedModel) -> set[str]:
    keys = model.all_tied_weights_keys
    return {*keys, *keys.values()}


def _experts_reason(model: nn.Module, config: QuantConfig, name: str) -> str | None:
    if not config.experts:
        return "experts=False"
    layer = model.get_submodule(name.rpartition(".")[0])
    if getattr(layer, "is_transposed", False):
        return "its weights are transposed: packed experts lie in rows"
    return experts.refusal(layer)


def _keep_halves(quantizer: Quantizer, formats: dict[str, str], stacked: Sequence[str]) -> None:
    """One product reads both tensors of a layer's experts: both are packed, or none."""
    for name in stacked:
        owner = name.rpartition(".")[0]
        others = [f"{owner}.{part}" for part in EXPERT_PARTS if f"{owner}.{part}" not in formats]
        if name in formats and others:
            del formats[name]
            quantizer.report.keep(name, f"one product reads it and {others[0]}, which stays plain")


def embedding_name(model: PreTrainedModel) -> str:
    """The name of the embedding table."""
    table = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is table)
