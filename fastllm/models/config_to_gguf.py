"""The metadata of a GGUF file from a ModelConfig: the inverse of config_gguf.

Keys are those that llama.cpp reads. Rotary scalings that the format has no key for become the
tensors `rope_freqs`, `rope_factors_long` and `rope_factors_short`, as its own converter makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from fastllm.models.config import ModelConfig
from fastllm.models.moe_config import MoeConfig
from fastllm.models.rope_scaling import RopeConfig, rope_frequencies
from fastllm.models.stored_tensor import StoredTensor

_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "olmoe": "olmoe",
}  # fmt: skip
# What llama.cpp's graphs of an architecture have, where they have no choice.
_FIXED = {
    "llama": {"qk_norm": False},
    "qwen2": {
        "attention_bias": True, "attention_output_bias": False, "mlp_bias": False, "qk_norm": False,
    },
    "qwen3": {
        "attention_bias": False, "attention_output_bias": False, "mlp_bias": False, "qk_norm": True,
    },
    "qwen3moe": {"attention_bias": False, "attention_output_bias": False, "qk_norm": True},
    "olmoe": {"attention_bias": False, "attention_output_bias": False, "qk_norm_whole": True},
}  # fmt: skip
_FIXED_EXPERTS = {
    "scoring": "softmax", "groups": 1, "scale": 1.0, "shared": 0, "bias_correction": False,
    "dense_layers": (),
}  # fmt: skip


def gguf_architecture(config: ModelConfig) -> str:
    """The architecture whose graph computes what the model does.

    Raises:
        ValueError: if there is none, naming the field.
    """
    if config.scalar_head:
        raise ValueError("a model with a scalar head cannot be exported to GGUF: it has no logits")
    arch = _ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise ValueError(
            f"model_type {config.model_type!r} cannot be exported to GGUF; these can: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    _check_fixed(config, _FIXED[arch], arch)
    if config.experts is not None:
        _check_fixed(config.experts, _FIXED_EXPERTS | {"renormalize": arch != "olmoe"}, arch)
    if arch == "olmoe":
        _check_fixed(config, {"num_key_value_heads": config.num_attention_heads}, arch)
    return arch


def _check_fixed(config: ModelConfig | MoeConfig, fixed: Mapping[str, object], arch: str) -> None:
    for name, needed in fixed.items():
        if getattr(config, name) != needed:
            raise ValueError(
                f"{name}={getattr(config, name)} has no GGUF form in architecture {arch!r}, which "
                f"has {name}={needed}"
            )


def config_metadata(config: ModelConfig) -> dict[str, object]:
    """Metadata of sizes and constants, `general.architecture` first.

    Raises:
        ValueError: for a model that the format cannot express, naming the field.
    """
    arch = gguf_architecture(config)
    keys: dict[str, object] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope.theta),
    }
    if config.experts is not None:
        keys["expert_count"] = config.experts.num_experts
        keys["expert_used_count"] = config.experts.per_token
        keys["expert_feed_forward_length"] = config.experts.moe_intermediate_size
    windows = set(config.sliding_window)
    if windows != {None}:
        if len(windows) > 1:
            raise ValueError("sliding_window differs between layers, which GGUF has no key for")
        keys["attention.sliding_window"] = windows.pop()
    keys |= _rope_keys(config)
    return {"general.architecture": arch} | {f"{arch}.{key}": v for key, v in keys.items()}


def _rope_keys(config: ModelConfig) -> dict[str, object]:
    rope = config.rope
    if rope.type in ("default", "llama3", "factors"):
        return {}
    if rope.type == "dynamic":
        raise ValueError("rope type dynamic has no GGUF form")
    if rope.type == "linear":
        assert rope.factor is not None, "RopeConfig checks it"
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    original = rope.original_max_position_embeddings
    assert original is not None, "RopeConfig checks it"
    attention = rope_frequencies(config, config.max_position_embeddings)[1]
    keys: dict[str, object] = {
        "rope.scaling.type": rope.type,
        "rope.scaling.original_context_length": original,
    }
    if rope.type == "longrope":
        return keys | {"rope.scaling.attn_factor": float(attention)}
    if not rope.truncate:
        raise ValueError("rope type yarn with truncate=False has no GGUF form")
    factor = rope.factor or config.max_position_embeddings / original
    usual = 1.0 if factor <= 1 else 1.0 + 0.1 * math.log(factor)  # which readers multiply with
    return keys | {
        "rope.scaling.factor": float(factor),
        "rope.scaling.attn_factor": attention / usual,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow or 1.0),
    }


def rope_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Divisors of the rotary frequencies, where the model has them: F32 `[rotary_dim / 2]`."""
    rope = config.rope
    if rope.type == "factors":
        return {"rope_freqs.weight": _vector(rope.factors)}
    if rope.type == "longrope":
        return {
            "rope_factors_long.weight": _vector(rope.long_factor),
            "rope_factors_short.weight": _vector(rope.short_factor),
        }
    if rope.type == "llama3":
        plain = replace(
            config,
            rope=RopeConfig(theta=rope.theta, partial_rotary_factor=rope.partial_rotary_factor),
        )
        length = config.max_position_embeddings
        divisors = rope_frequencies(plain, length)[0] / rope_frequencies(config, length)[0]
        return {"rope_freqs.weight": _vector(tuple(divisors.tolist()))}
    return {}


def _vector(values: tuple[float, ...] | None) -> StoredTensor:
    data = torch.tensor(values, dtype=torch.float32)
    return StoredTensor("f32", tuple(data.shape), data)
