"""MoeConfig from and to the keys of Hugging Face's config.json, which differ by family."""

from __future__ import annotations

from typing import Any

from fastllm.models.config import LATENT_TYPES, ModelConfig
from fastllm.models.fields import Fields, describe
from fastllm.models.moe_config import MoeConfig

MAX_LAYERS_LISTED = 1024


def experts_from_hf(fields: Fields, model_type: str) -> MoeConfig | None:
    """The experts that a config.json describes; None: every layer has a plain MLP.

    Raises ModelFileError for values that the decoder does not know.
    """
    if model_type == "mixtral":
        return MoeConfig(
            num_experts=_count(fields, 8),
            per_token=fields.integer("num_experts_per_tok", 2),
            moe_intermediate_size=fields.integer("intermediate_size"),
            renormalize=True,
        )
    if model_type == "olmoe":
        if fields.has("clip_qkv"):
            raise fields.fail("clip_qkv", "clipped queries, keys and values are not supported")
        return MoeConfig(
            num_experts=_count(fields, 64),
            per_token=fields.integer("num_experts_per_tok", 8),
            moe_intermediate_size=fields.integer("intermediate_size"),
            renormalize=fields.boolean("norm_topk_prob", False),
        )
    if model_type == "qwen3_moe":
        return _qwen3(fields)
    return _deepseek(fields, model_type) if model_type in LATENT_TYPES else None


def _qwen3(fields: Fields) -> MoeConfig:
    layers = _layers(fields)
    step = fields.integer("decoder_sparse_step", 1)
    if step < 1:
        raise fields.fail("decoder_sparse_step", f"must be at least 1, is {step}")
    named = fields.sequence("mlp_only_layers", MAX_LAYERS_LISTED, default=())
    for layer in named:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise fields.fail("mlp_only_layers", f"must hold integers, holds {describe(layer)}")
    return MoeConfig(
        num_experts=_count(fields, 128),
        per_token=fields.integer("num_experts_per_tok", 8),
        moe_intermediate_size=fields.integer("moe_intermediate_size", 768),
        renormalize=fields.boolean("norm_topk_prob", False),
        dense_layers=tuple(n for n in range(layers) if n in named or (n + 1) % step),
    )


def _deepseek(fields: Fields, model_type: str) -> MoeConfig | None:
    third = model_type == "deepseek_v3"
    layers = _layers(fields)
    dense = fields.integer("first_k_dense_replace", 3 if third else 0)
    without = "n_routed_experts" in fields.values and not fields.has("n_routed_experts")
    if dense >= layers or without:
        return None
    _refuse(fields, "moe_layer_freq", fields.integer("moe_layer_freq", 1), 1)
    scoring = "sigmoid" if third else "softmax"
    _refuse(fields, "scoring_func", fields.string("scoring_func", scoring), scoring)
    return MoeConfig(
        num_experts=fields.integer("n_routed_experts", 256 if third else 64),
        per_token=fields.integer("num_experts_per_tok", *((8,) if third else ())),
        moe_intermediate_size=fields.integer("moe_intermediate_size", 2048 if third else 1407),
        shared=_or_null(fields, "n_shared_experts", 1 if third else 2, 0),
        scoring=scoring,
        scale=fields.number("routed_scaling_factor", 2.5 if third else 1.0),
        bias_correction=third,
        dense_layers=tuple(range(max(dense, 0))),
        **(_third_choice(fields) if third else _second_choice(fields)),
    )


def _second_choice(fields: Fields) -> dict[str, Any]:
    """How DeepSeek-V2 chooses: by the scores, or among the best groups of them."""
    if fields.boolean("norm_topk_prob", False):  # its own code and transformers differ
        raise fields.fail("norm_topk_prob", "DeepSeek-V2 models with true are not supported")
    method = fields.string("topk_method", "greedy")
    if method == "greedy":
        return {}
    _refuse(fields, "topk_method", method, "group_limited_greedy")
    return {"groups": fields.integer("n_group"), "kept_groups": fields.integer("topk_group")}


def _third_choice(fields: Fields) -> dict[str, Any]:
    _refuse(fields, "topk_method", fields.string("topk_method", "noaux_tc"), "noaux_tc")
    return {
        "groups": _or_null(fields, "n_group", 8, 1),
        "kept_groups": _or_null(fields, "topk_group", 4, 1),
        "group_score": "top2",
        "renormalize": fields.boolean("norm_topk_prob", True),
    }


def _count(fields: Fields, default: int) -> Any:
    """Versions of transformers spell the number of experts in two ways, and read both."""
    return fields.integer("num_experts", fields.integer("num_local_experts", default))


def _or_null(fields: Fields, key: str, absent: int, null: int) -> Any:
    """A whole number; what an absent key means, and what null does."""
    return fields.integer(key, null if key in fields.values else absent)


def _refuse(fields: Fields, key: str, value: object, known: object) -> None:
    if value != known:
        raise fields.fail(key, f"{describe(value)} is not supported, only {describe(known)} is")


def _layers(fields: Fields) -> int:
    """As many as ModelConfig takes: it refuses other numbers, which must not cost memory here."""
    return int(max(0, min(fields.integer("num_hidden_layers"), MAX_LAYERS_LISTED)))


def experts_to_hf(config: ModelConfig, experts: MoeConfig) -> dict[str, Any]:
    """The keys of config.json that say what the experts are."""
    values: dict[str, Any] = {"num_experts_per_tok": experts.per_token}
    if config.model_type == "mixtral":
        return values | {"num_local_experts": experts.num_experts}
    values["norm_topk_prob"] = experts.renormalize
    if config.model_type == "olmoe":
        return values | {"num_experts": experts.num_experts}
    values["moe_intermediate_size"] = experts.moe_intermediate_size
    if config.model_type == "qwen3_moe":
        return values | {
            "num_experts": experts.num_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(experts.dense_layers),
        }
    values |= {
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.shared,
        "n_group": experts.groups,
        "topk_group": experts.kept_groups,
        "routed_scaling_factor": experts.scale,
        "scoring_func": experts.scoring,
        "first_k_dense_replace": len(experts.dense_layers),
        "moe_layer_freq": 1,
    }
    if config.model_type == "deepseek_v2":
        return values | {"topk_method": "greedy" if experts.groups == 1 else "group_limited_greedy"}
    # layers that predict further tokens are not kept
    return values | {"topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
