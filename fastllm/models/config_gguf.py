"""ModelConfig from the metadata of a GGUF file, of the architectures in ARCHITECTURES."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.fields import Fields, describe
from fastllm.models.gguf import GGUFTensor
from fastllm.models.moe_config import MoeConfig
from fastllm.models.rope_scaling import RopeConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "olmoe")
_MODEL_TYPES = {"llama": "mixtral", "qwen3moe": "qwen3_moe"}  # with experts
_SPARSE = ("llama", "qwen3moe", "olmoe")  # which may have experts, or always do
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GGUFTensor],
    path: str | os.PathLike[str],
) -> ModelConfig:
    """See ModelConfig.from_gguf."""
    general = Fields(metadata, path)
    arch = general.string("general.architecture")
    if arch not in ARCHITECTURES:
        raise general.fail(
            "general.architecture",
            f"{describe(arch)} is not supported",
            f"Supported: {', '.join(ARCHITECTURES)}",
        )
    _refuse_unsupported(general, arch)
    prefix = f"{arch}."
    fields = Fields(
        {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}, path, prefix
    )
    try:
        return _build(general, fields, tensors, arch)
    except ModelFileError:
        raise
    except ValueError as error:  # from the checks of ModelConfig and RopeConfig
        raise ModelFileError(path, "metadata", str(error)) from None


def _refuse_unsupported(general: Fields, arch: str) -> None:
    if general.integer("split.count", default=1) > 1:
        raise general.fail(
            "split.count",
            "the model is split over several files",
            "Merge them with llama.cpp's gguf-split --merge",
        )
    experts = general.integer(f"{arch}.expert_count", default=0)
    if experts > 0 and arch not in _SPARSE:
        raise general.fail(f"{arch}.expert_count", "this architecture has no experts here")
    if experts < 1 and arch in ("qwen3moe", "olmoe"):
        raise general.fail(f"{arch}.expert_count", f"must be at least 1, is {experts}")
    for key in ("expert_shared_count", "leading_dense_block_count"):
        if general.integer(f"{arch}.{key}", default=0):
            raise general.fail(f"{arch}.{key}", "only 0 is supported")


def _build(
    general: Fields, fields: Fields, tensors: Mapping[str, GGUFTensor], arch: str
) -> ModelConfig:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise general.fail("token_embd.weight", "the embedding matrix is missing")
    heads = fields.integer("attention.head_count")
    hidden = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", default=None)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise fields.fail("embedding_length", f"{hidden} is not a multiple of {heads} heads")
        head_dim = hidden // heads
    if fields.integer("attention.value_length", default=head_dim) != head_dim:
        raise fields.fail("attention.value_length", f"differs from the key length {head_dim}")
    layers = fields.integer("block_count")
    window = fields.integer("attention.sliding_window", default=0) or None
    experts = _experts(fields, arch)
    normed = "blk.0.attn_q_norm.weight" in tensors
    return ModelConfig(
        model_type=_MODEL_TYPES.get(arch, arch) if experts is not None else arch,
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("attention.head_count_kv", default=heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=fields.integer("context_length"),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        attention_output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm=normed and arch != "olmoe",
        qk_norm_whole=normed and arch == "olmoe",
        experts=experts,
        sliding_window=(window,) * layers if window and 1 <= layers <= 1024 else (),
        rope=_rope(fields, tensors, head_dim),
        bos_token_id=general.integer("tokenizer.ggml.bos_token_id", default=None),
        eos_token_ids=_end_tokens(general),
    )


def _experts(fields: Fields, arch: str) -> MoeConfig | None:
    count = fields.integer("expert_count", default=0)
    if count < 1:
        return None
    width = fields.integer("expert_feed_forward_length", default=None)
    if width is None or arch != "qwen3moe":
        width = fields.integer("feed_forward_length")
    return MoeConfig(
        num_experts=count,
        per_token=fields.integer("expert_used_count"),
        moe_intermediate_size=width,
        renormalize=arch != "olmoe",
    )


def _end_tokens(general: Fields) -> tuple[int, ...]:
    """End of text, of turn, of message: generation stops at each."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [general.integer(f"tokenizer.ggml.{key}", default=None) for key in keys]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _rope(fields: Fields, tensors: Mapping[str, GGUFTensor], head_dim: int) -> RopeConfig:
    rotary = fields.integer("rope.dimension_count", default=head_dim)
    if not 0 < rotary <= head_dim or rotary % 2:
        raise fields.fail(
            "rope.dimension_count", f"must be even and from 2 to {head_dim}, is {rotary}"
        )
    kind = fields.string("rope.scaling.type", default=None)
    factor = fields.number("rope.scaling.factor", default=0.0)
    legacy = fields.number("rope.scale_linear", default=0.0)  # before scaling types existed
    if kind is None:
        kind, factor = ("linear", factor or legacy) if factor or legacy else ("none", 0.0)
    known: dict[str, Any] = {
        "theta": fields.number("rope.freq_base", default=10000.0),
        "partial_rotary_factor": rotary / head_dim,
    }
    factors = {name: _factor_values(fields, tensors, name) for name in ROPE_TENSORS}
    if kind == "yarn":
        return RopeConfig(type="yarn", **_yarn(fields, factor), **known)
    if kind == "longrope" or factors["rope_factors_long.weight"] is not None:
        return RopeConfig(type="longrope", **_longrope(fields, factors), **known)
    if kind == "linear" and factor and factor != 1:
        if factors["rope_freqs.weight"] is None:
            return RopeConfig(type="linear", factor=factor, **known)
        raise fields.fail("rope.scaling.type", "linear together with rope_freqs is not supported")
    if kind not in ("none", "linear"):
        raise fields.fail(
            "rope.scaling.type",
            f"{describe(kind)} is not supported",
            "Supported: none, linear, yarn, longrope",
        )
    if factors["rope_freqs.weight"] is not None:
        return RopeConfig(type="factors", factors=factors["rope_freqs.weight"], **known)
    return RopeConfig(**known)


def _factor_values(
    fields: Fields, tensors: Mapping[str, GGUFTensor], name: str
) -> tuple[float, ...] | None:
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.type_name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 512:
        raise ModelFileError(
            fields.file, name, "must be a vector of at most 512 F32 values, is "
            f"{tensor.type_name} {list(tensor.shape)}"
        )  # fmt: skip
    values = tuple(tensor.data.view(torch.float32).tolist())
    if not all(math.isfinite(v) for v in values):
        raise ModelFileError(fields.file, name, "holds NaN or infinity")
    return values


def _yarn(fields: Fields, factor: float) -> dict[str, Any]:
    """The file's attention factors multiply the usual 1 + 0.1 ln(factor), unlike Hugging Face's."""
    if factor <= 0:
        raise fields.fail("rope.scaling.factor", f"must be above 0 for yarn, is {factor:g}")
    if fields.number("rope.scaling.yarn_ext_factor", default=1.0) != 1.0:
        raise fields.fail("rope.scaling.yarn_ext_factor", "other than 1 is not supported")
    extra = fields.number("rope.scaling.attn_factor", default=1.0)
    extra *= fields.number("rope.scaling.yarn_attn_factor", default=1.0)
    usual = 1.0 if factor <= 1 else 1.0 + 0.1 * math.log(factor)
    return {
        "factor": factor,
        "attention_factor": extra * usual,
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", default=None),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", default=None),
        "original_max_position_embeddings": fields.integer(
            "rope.scaling.original_context_length", default=fields.integer("context_length")
        ),
    }


def _longrope(fields: Fields, factors: Mapping[str, tuple[float, ...] | None]) -> dict[str, Any]:
    return {
        "short_factor": factors["rope_factors_short.weight"],
        "long_factor": factors["rope_factors_long.weight"],
        "attention_factor": fields.number("rope.scaling.attn_factor", default=1.0),
        "original_max_position_embeddings": fields.integer(
            "rope.scaling.original_context_length", default=fields.integer("context_length")
        ),
    }
