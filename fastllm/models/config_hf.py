"""ModelConfig from and to Hugging Face's config.json, in transformers 4 and 5 spelling.

transformers 4 has `rope_theta` and `rope_scaling`, 5 has `rope_parameters`. A key that is missing
means the default of the model's own configuration class, because transformers leaves defaults out
of the files it saves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastllm.errors import ModelFileError
from fastllm.models.config import LATENT_TYPES, MODEL_TYPES, ModelConfig
from fastllm.models.config_hf_experts import MAX_LAYERS_LISTED, experts_from_hf, experts_to_hf
from fastllm.models.config_hf_rope import rope_from_hf, rope_to_hf
from fastllm.models.fields import Fields, describe
from fastllm.models.mla_config import MlaConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What the configuration class of a model type assumes for absent keys."""

    class_name: str
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    q_lora_rank: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


_MODELS = {
    "llama": _Defaults("LlamaForCausalLM", 2048, 1, (2,)),
    "mistral": _Defaults("MistralForCausalLM", 131072, 1, (2,), num_key_value_heads=8),
    "qwen2": _Defaults("Qwen2ForCausalLM", 32768, None, (), num_key_value_heads=32),
    "qwen3": _Defaults("Qwen3ForCausalLM", 32768, None, (), num_key_value_heads=32, head_dim=128),
    "mixtral": _Defaults(
        "MixtralForCausalLM",
        131072,
        1,
        (2,),
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
    ),
    "qwen3_moe": _Defaults("Qwen3MoeForCausalLM", 32768, None, (), num_key_value_heads=4),
    "olmoe": _Defaults("OlmoeForCausalLM", 4096, None, (50279,), rms_norm_eps=1e-5),
    "deepseek_v2": _Defaults("DeepseekV2ForCausalLM", 2048, 1, (2,), q_lora_rank=1536),
    "deepseek_v3": _Defaults(
        "DeepseekV3ForCausalLM",
        4096,
        0,
        (1,),
        num_key_value_heads=128,
        q_lora_rank=1536,
    ),
}


_WINDOWED = ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
_ONE_WINDOW = ("mistral", "mixtral", "qwen3_moe")  # of all layers, or none
_OPTIONAL_ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe", "olmoe", *LATENT_TYPES)
_OPTIONAL_MLP_BIAS = ("llama", "deepseek_v2")


def config_from_hf(
    values: Mapping[str, Any],
    path: str | os.PathLike[str],
    generation: Mapping[str, Any] | None,
) -> ModelConfig:
    """See ModelConfig.from_hf."""
    fields = Fields(values, path)
    model_type = _model_type(fields)
    defaults = _MODELS[model_type]
    try:
        return ModelConfig(
            model_type=model_type,
            **_sizes(fields, defaults),
            **_features(fields, model_type),
            **_scalar_head(fields),
            mla=_latent(fields, model_type),
            experts=experts_from_hf(fields, model_type),
            sliding_window=_sliding_window(fields, model_type),
            rope=rope_from_hf(fields, defaults.rope_theta, defaults.max_position_embeddings),
            **_tokens(fields, defaults, Fields(generation or {}, path)),
            dtype=_dtype(fields),
        )
    except ModelFileError:
        raise
    except ValueError as error:  # from the checks of ModelConfig and RopeConfig
        raise ModelFileError(path, "config", str(error)) from None


def _model_type(fields: Fields) -> str:
    names = fields.strings("architectures", 16, default=())
    by_class = {d.class_name: model_type for model_type, d in _MODELS.items()}
    by_class |= {_judging(name): model_type for name, model_type in by_class.items()}
    model_type = fields.string("model_type", default=None)
    if names:
        found = [by_class[name] for name in names if name in by_class]
        if found and model_type in (None, found[0]):
            return found[0]
    elif model_type in _MODELS:
        return str(model_type)
    raise fields.fail(
        "architectures" if names else "model_type",
        f"{describe(names[0] if names else model_type)} (model_type {describe(model_type)}) is "
        "not a supported architecture",
        f"Supported: {', '.join(d.class_name for d in _MODELS.values())} with model_type "
        f"{', '.join(MODEL_TYPES)}",
    )


def _judging(class_name: str) -> str:
    """The class of the same decoder with a head that scores."""
    return class_name.replace("ForCausalLM", "ForSequenceClassification")


def _scalar_head(fields: Fields) -> dict[str, Any]:
    """What the class says about the head."""
    names = fields.strings("architectures", 16, default=())
    if not any(name == _judging(d.class_name) for name in names for d in _MODELS.values()):
        tied = fields.boolean("tie_word_embeddings", default=False)
        return {"scalar_head": False, "tie_word_embeddings": tied}
    labels = fields.values.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else fields.integer("num_labels", default=2)
    if count != 1:
        raise fields.fail(
            "id2label", f"names {count} labels", "A reward model has one (num_labels=1)"
        )
    pad = fields.token_ids("pad_token_id", ())
    return {
        "scalar_head": True,
        "tie_word_embeddings": True,  # there is no other head that the embedding could differ from
        "pad_token_id": pad[0] if pad else None,
    }


def _sizes(fields: Fields, defaults: _Defaults) -> dict[str, Any]:
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    kv_heads = heads  # what an explicit null means
    if "num_key_value_heads" not in fields.values:
        kv_heads = defaults.num_key_value_heads or heads
    head_dim = fields.integer("head_dim", default=None) or defaults.head_dim
    if defaults.q_lora_rank is not None:  # latent attention; its files' head_dim is the rotated one
        head_dim = fields.integer("qk_nope_head_dim", 128) + fields.integer("qk_rope_head_dim", 64)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise fields.fail(
                "hidden_size", f"{hidden} is not a multiple of num_attention_heads {heads}"
            )
        head_dim = hidden // heads
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", default=kv_heads),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps", default=defaults.rms_norm_eps),
        "max_position_embeddings": fields.integer(
            "max_position_embeddings", default=defaults.max_position_embeddings
        ),
    }


def _features(fields: Fields, model_type: str) -> dict[str, Any]:
    """Which biases and norms exist: fixed by the class, or said by the file."""
    optional = model_type in _OPTIONAL_ATTENTION_BIAS
    flag = optional and fields.boolean("attention_bias", default=False)
    return {
        "hidden_act": fields.string("hidden_act", default="silu"),
        "attention_bias": flag or model_type == "qwen2",
        "attention_output_bias": flag,
        "mlp_bias": model_type in _OPTIONAL_MLP_BIAS and fields.boolean("mlp_bias", default=False),
        "qk_norm": model_type in ("qwen3", "qwen3_moe"),
        "qk_norm_whole": model_type == "olmoe",
    }


def _latent(fields: Fields, model_type: str) -> MlaConfig | None:
    defaults = _MODELS[model_type]
    if defaults.q_lora_rank is None:
        return None
    absent = "q_lora_rank" not in fields.values  # an explicit null means that there is none
    return MlaConfig(
        q_lora_rank=fields.integer("q_lora_rank", defaults.q_lora_rank if absent else None),
        kv_lora_rank=fields.integer("kv_lora_rank", 512),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", 128),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim", 64),
        v_head_dim=fields.integer("v_head_dim", 128),
        rope_interleave=model_type == "deepseek_v2" or fields.boolean("rope_interleave", True),
    )


def _sliding_window(fields: Fields, model_type: str) -> tuple[int | None, ...]:
    """Per layer; () = no layer has one. The other classes have none whatever the file says."""
    layers = fields.integer("num_hidden_layers")
    if model_type not in _WINDOWED or not 1 <= layers <= MAX_LAYERS_LISTED:
        return ()  # ModelConfig refuses such a number of layers
    if model_type in ("mistral", "mixtral"):
        absent = model_type == "mistral" and "sliding_window" not in fields.values
        window = fields.integer("sliding_window", default=4096 if absent else None)
        return (window,) * layers
    enabled = fields.boolean("use_sliding_window", default=False)
    window = fields.integer("sliding_window", default=4096) if enabled else None
    if model_type in _ONE_WINDOW:
        return (window,) * layers
    kinds = fields.strings("layer_types", MAX_LAYERS_LISTED, default=None)
    if kinds is None:
        first = fields.integer("max_window_layers", default=28)
        return tuple(window if layer >= first else None for layer in range(layers))
    if len(kinds) != layers:
        raise fields.fail("layer_types", f"has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.fail("layer_types", f"{describe(kind)} is not a supported layer type")
    if window is None and "sliding_attention" in kinds:
        raise fields.fail("layer_types", "has sliding layers but the file gives them no window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _tokens(fields: Fields, defaults: _Defaults, generation: Fields) -> dict[str, Any]:
    """Begin and end tokens. Chat models often list their end of turn in the generation file."""
    bos = fields.token_ids(
        "bos_token_id",
        () if "bos_token_id" in fields.values or defaults.bos_token_id is None
        else (defaults.bos_token_id,),
    )  # fmt: skip
    eos = fields.token_ids(
        "eos_token_id", () if "eos_token_id" in fields.values else defaults.eos_token_ids
    )
    eos = tuple(dict.fromkeys((*eos, *generation.token_ids("eos_token_id"))))
    vocab = fields.integer("vocab_size")
    if "bos_token_id" not in fields.values:  # a class default means nothing in a tiny vocabulary
        bos = tuple(t for t in bos if t < vocab)
    if "eos_token_id" not in fields.values:
        eos = tuple(t for t in eos if t < vocab)
    return {"bos_token_id": bos[0] if bos else None, "eos_token_ids": eos}


def _dtype(fields: Fields) -> torch.dtype | None:
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    name = fields.string(key, default=None)
    if name is None:
        return None
    if name.removeprefix("torch.") not in _DTYPES:
        raise fields.fail(key, f"{describe(name)} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name.removeprefix("torch.")]


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """See ModelConfig.to_hf."""
    eos = config.eos_token_ids
    values: dict[str, Any] = {
        "architectures": [_MODELS[config.model_type].class_name],
        "model_type": config.model_type,
        "rope_parameters": rope_to_hf(config),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        **{name: getattr(config, name) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
            "max_position_embeddings", "hidden_act", "tie_word_embeddings")},
    }  # fmt: skip
    if config.scalar_head:
        values |= {
            "architectures": [_judging(_MODELS[config.model_type].class_name)],
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
            "pad_token_id": config.pad_token_id,
        }
    if config.dtype is not None:
        values["dtype"] = str(config.dtype).removeprefix("torch.")
    if config.model_type in _OPTIONAL_ATTENTION_BIAS:
        values["attention_bias"] = config.attention_bias
    if config.model_type in _OPTIONAL_MLP_BIAS:
        values["mlp_bias"] = config.mlp_bias
    if config.mla is not None:
        values |= _latent_to_hf(config, config.mla)
    if config.experts is not None:
        values |= experts_to_hf(config, config.experts)
    values.update(_windows_to_hf(config))
    try:
        read_back = config_from_hf(values, "config.json", None)
    except ModelFileError as error:
        raise ValueError(f"config has no Hugging Face form: {error}") from None
    for name in ("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm",
                 "qk_norm_whole", "sliding_window", "mla", "experts", "scalar_head"):  # fmt: skip
        if getattr(read_back, name) != getattr(config, name):
            raise ValueError(
                f"config has {name}={getattr(config, name)}, which Hugging Face's "
                f"{values['architectures'][0]} cannot express"
            )
    return values


def _latent_to_hf(config: ModelConfig, mla: MlaConfig) -> dict[str, Any]:
    values = asdict(mla)
    if config.model_type == "deepseek_v2":
        del values["rope_interleave"]  # its class knows no other order
    # transformers reads the rotated width from head_dim; experts, where there are, say how many
    # layers have a plain MLP
    return values | {
        "head_dim": mla.qk_rope_head_dim,
        "first_k_dense_replace": config.num_hidden_layers,
    }


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    windows = {w for w in config.sliding_window if w is not None}
    window = max(windows, default=None)
    if config.model_type not in _WINDOWED:
        return {}
    if config.model_type in ("mistral", "mixtral"):
        return {"sliding_window": window}
    if config.model_type in _ONE_WINDOW:
        return {"use_sliding_window": window is not None, "sliding_window": window}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.sliding_window]
    first = kinds.index("sliding_attention") if windows else config.num_hidden_layers
    return {
        "use_sliding_window": bool(windows),
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": kinds,
    }
