"""RopeConfig from and to Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm.models.config import ModelConfig
from fastllm.models.fields import Fields
from fastllm.models.rope_scaling import RopeConfig

MAX_FACTORS = 512  # half of the largest head_dim

_NUMBERS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "low_freq_factor", "high_freq_factor")  # fmt: skip
_NEEDS_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")


def rope_from_hf(fields: Fields, default_theta: float, default_max_positions: int) -> RopeConfig:
    """The rotary embedding that a config.json describes.

    default_theta, default_max_positions: what holds for its `model_type` where the file is silent.
    Raises ModelFileError for values that the decoder does not know.
    """
    key = "rope_scaling" if fields.has("rope_scaling") else "rope_parameters"
    rope = fields.section(key) or Fields({}, fields.file)
    for name, value in rope.values.items():
        if isinstance(value, Mapping):
            raise rope.fail(name, "rope parameters per layer type are not supported")
    type_key = "type" if rope.has("type") and not rope.has("rope_type") else "rope_type"
    rope_type = rope.string(type_key, default="default")
    if rope_type == "factors":  # a GGUF matter, not a name that config.json knows
        raise rope.fail(type_key, "the rope type 'factors' is not one of Hugging Face's")
    known: dict[str, Any] = {name: rope.number(name, default=None) for name in _NUMBERS}
    for name in ("short_factor", "long_factor"):
        known[name] = rope.numbers(name, MAX_FACTORS, default=None)
    original = fields.integer(
        "original_max_position_embeddings",
        default=rope.integer("original_max_position_embeddings", default=None),
    )
    if original is None and rope_type in _NEEDS_ORIGINAL_LENGTH:
        original = fields.integer("max_position_embeddings", default_max_positions)
    partial = fields.number("partial_rotary_factor", default=1.0)
    return RopeConfig(
        type=rope_type,
        theta=rope.number("rope_theta", default=fields.number("rope_theta", default=default_theta)),
        partial_rotary_factor=rope.number("partial_rotary_factor", default=partial),
        original_max_position_embeddings=original,
        truncate=rope.boolean("truncate", default=True),
        **known,
    )


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` that transformers 5 reads."""
    rope = config.rope
    values: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.partial_rotary_factor != 1.0:
        values["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.type == "factors":  # fixed factors are a longrope whose two sets are the same
        values |= {
            "rope_type": "longrope",
            "short_factor": list(rope.factors or ()),
            "long_factor": list(rope.factors or ()),
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": max(config.max_position_embeddings, 2),
        }
        return values
    for name in (*_NUMBERS, "original_max_position_embeddings"):
        if getattr(rope, name) is not None:
            values[name] = getattr(rope, name)
    for name in ("short_factor", "long_factor"):
        if getattr(rope, name) is not None:
            values[name] = list(getattr(rope, name))
    if not rope.truncate:
        values["truncate"] = False
    if rope.type == "yarn":
        values.setdefault("factor", None)  # transformers looks it up, and derives it from None
    return values
