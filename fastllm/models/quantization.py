"""What a name such as "nf4" or "q4_k_m" asks of a model that is quantized as it is loaded."""

from __future__ import annotations

from fastllm.models.config import ModelConfig
from fastllm.ops.quant_format import QUANT_FORMATS, format_of
from fastllm.quantize.mixes import MIXES, Sizes, plan
from fastllm.quantize.rule import QuantRule

# Mixes that are no format: "q4_k" and "q8_0" ask for that format everywhere.
_MIXES = tuple(name for name in MIXES if name not in QUANT_FORMATS)


def check_quantization(name: str) -> None:
    """Raise ValueError unless `quant_rule` knows the name."""
    if name.lower() not in _MIXES and format_of(name).dense:
        raise ValueError(f"format {name!r} is not quantized: nothing would change")


def mix_sizes(config: ModelConfig) -> Sizes:
    """What the rules of mixes ask of a model with that config."""
    return Sizes(
        layers=config.num_hidden_layers,
        experts=0 if config.experts is None else config.experts.num_experts,
        many_queries=config.num_key_value_heads < config.num_attention_heads,
        tied=config.tie_word_embeddings,
    )


def quant_rule(name: str, config: ModelConfig) -> QuantRule:
    """The rule for the layers of a model; its embedding and LM head stay as they are.

    Args:
        name: a format or alias of `fastllm.ops.quant_format`, or one of llama.cpp's mixes.
        config: of the model.

    Raises:
        ValueError: for an unknown name, with the nearest ones.
    """
    check_quantization(name)
    mix = name.lower()
    if mix not in _MIXES:
        return QuantRule(name)
    chosen = plan(mix, config.weight_shapes(), mix_sizes(config))
    base = MIXES[mix].base
    wanted = {
        weight.removesuffix(".weight"): chosen.fallen.get(weight, (format,))[0]
        for weight, format in chosen.formats.items()
    }
    raised = {layer: format for layer, format in wanted.items() if format != base}
    return QuantRule(base, mix=mix, raised=raised)
