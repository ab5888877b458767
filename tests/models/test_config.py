"""ModelConfig: the same values that transformers and the gguf keys mean; bad ones refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.rope_scaling import RopeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CLASSES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SHARED = (*SIZES, "rms_norm_eps", "max_position_embeddings", "hidden_act", "tie_word_embeddings")


def hf(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"architectures": [NAMES[model_type]], "model_type": model_type, **SIZES, **changes}


def assert_same_meaning(ours: ModelConfig, theirs: PreTrainedConfig) -> None:
    for name in SHARED:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // 4
    assert ours.rope.type == theirs.rope_parameters["rope_type"]
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.bos_token_id == theirs.bos_token_id
    eos = [] if theirs.eos_token_id is None else theirs.eos_token_id
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [eos])
    if ours.model_type == "mistral":
        assert ours.sliding_window == (theirs.sliding_window,) * theirs.num_hidden_layers
    elif ours.model_type.startswith("qwen"):
        sliding = [w is not None for w in ours.sliding_window]
        assert sliding == [t == "sliding_attention" for t in theirs.layer_types]


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("style", ["saved", "absent keys", "transformers 4"])
def test_a_config_means_what_transformers_takes_it_for(
    model_type: str, style: str, tmp_path: Path
) -> None:
    values = hf(model_type, rope_theta=5e5, rms_norm_eps=1e-5)
    if style == "absent keys":
        values = hf(model_type)
        if model_type == "llama":
            del values["num_key_value_heads"]
    theirs = CLASSES[model_type](**values)
    if style == "saved":
        theirs.save_pretrained(tmp_path)
        assert_same_meaning(ModelConfig.from_directory(tmp_path), theirs)
    else:
        assert_same_meaning(ModelConfig.from_hf(values), theirs)


@pytest.mark.parametrize(
    "values",
    [
        hf("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32,
           eos_token_id=[2, 5], bos_token_id=3, torch_dtype="bfloat16"),
        hf("llama", rope_theta=5e5, rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024}, max_position_embeddings=8192),
        hf("mistral", sliding_window=128),
        hf("mistral", sliding_window=None, head_dim=32),
        hf("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2),
        hf("qwen2", rope_scaling={"type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": 8192}),
        hf("qwen2", rope_parameters={"rope_type": "yarn", "factor": None, "rope_theta": 1e6,
                                     "original_max_position_embeddings": 8192, "truncate": False}),
        hf("qwen3", layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=8,
           use_sliding_window=True, attention_bias=True, head_dim=16),
        hf("llama", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4,
                                     "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                                     "original_max_position_embeddings": 512}),
        hf("llama", rope_scaling={"type": "dynamic", "factor": 2.0}, dtype="float32"),
        hf("llama", rope_scaling={"type": "linear", "factor": 2.0}),
    ],
)  # fmt: skip
def test_to_hf_is_loaded_by_transformers_and_reads_back_equal(
    values: dict[str, Any], tmp_path: Path
) -> None:
    ours = ModelConfig.from_hf(values)
    saved = ours.to_hf()
    assert ModelConfig.from_hf(saved) == ours
    (tmp_path / "config.json").write_text(json.dumps(saved))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is CLASSES[ours.model_type]
    assert_same_meaning(ours, theirs)


def test_biases_and_norms_follow_the_class() -> None:
    def parts(config: ModelConfig) -> tuple[bool, ...]:
        return (
            config.attention_bias,
            config.attention_output_bias,
            config.mlp_bias,
            config.qk_norm,
        )

    assert parts(ModelConfig.from_hf(hf("qwen2"))) == (True, False, False, False)
    assert parts(ModelConfig.from_hf(hf("qwen3"))) == (False, False, False, True)
    llama = ModelConfig.from_hf(hf("llama", attention_bias=True))
    assert parts(llama) == (True, True, False, False)
    assert parts(ModelConfig.from_hf(hf("mistral"))) == (False, False, False, False)


@pytest.mark.parametrize("model_type", CLASSES)
def test_weight_shapes_are_those_of_the_transformers_model(model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    for tied in (False, True):
        values = hf(model_type, tie_word_embeddings=tied)
        if model_type == "llama":
            values |= {"attention_bias": True, "mlp_bias": True}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CLASSES[model_type](**values))
        theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert ModelConfig.from_hf(values).weight_shapes() == theirs


def test_windows_count_the_query_itself_and_kernels_do_not() -> None:
    config = ModelConfig.from_hf(hf("mistral", sliding_window=128))
    assert config.window_left(0) == 127
    assert ModelConfig.from_hf(hf("llama", sliding_window=128)).window_left(0) == -1


def test_end_tokens_of_the_generation_config_are_added(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf("qwen2", eos_token_id=7)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (7, 9)


def test_unknown_keys_are_not_read() -> None:
    odd = hf("llama", auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True, x=float("nan"))
    assert ModelConfig.from_hf(odd) == ModelConfig.from_hf(hf("llama"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*Supported: LlamaForCausalLM"),
    ({"architectures": [1]}, "architectures"),
    ({"architectures": None, "model_type": "bert"}, r"model_type: 'bert'.*llama, mistral"),
    ({"model_type": "qwen2"}, "architectures"),
    ({"vocab_size": 1 << 60}, "vocab_size must be from 1"),
    ({"vocab_size": "320"}, "vocab_size: must be an integer"),
    ({"vocab_size": None}, "vocab_size: is missing"),
    ({"vocab_size": True}, "vocab_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": 63}, "not a multiple of num_attention_heads"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": 15}, "head_dim 15 is odd"),
    ({"head_dim": 1 << 40}, "head_dim"),
    ({"intermediate_size": 0.5}, "intermediate_size"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*only silu"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"rope_theta": 1e300}, "theta"),
    ({"rope_theta": 0}, "theta"),
    ({"rope_scaling": []}, "rope_scaling: must be an object"),
    ({"rope_scaling": {"type": "magic"}}, "magic"),
    ({"rope_scaling": {"type": "factors"}}, "factors"),
    ({"rope_scaling": {"type": "linear"}}, "needs factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be from"),
    ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4,
                       "high_freq_factor": 4}}, "low_freq_factor < high_freq_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
     "needs 8 values"),
    ({"rope_scaling": {"type": "longrope", "short_factor": "1", "long_factor": [1.0]}},
     "rope_scaling.short_factor: must be a list"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
    ({"partial_rotary_factor": 0.7}, "rotary dimension must be even"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"eos_token_id": [1.5]}, "eos_token_id"),
    ({"bos_token_id": 999}, "bos_token_id 999"),
    ({"dtype": "int8"}, "dtype"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD, ids=[str(change)[:40] for change, _ in BAD])
def test_bad_values_are_refused_naming_file_and_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        ModelConfig.from_hf(hf() | change, "dir/config.json")
    assert "dir/config.json" in str(caught.value)


def test_bad_layer_types_are_refused() -> None:
    for change, message in [
        ({"layer_types": ["full_attention"]}, "1 entries for 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "not a supported layer type"),
        ({"layer_types": ["sliding_attention"] * 4}, "no window"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            ModelConfig.from_hf(hf("qwen3", **change))


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "must be an object"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("{}" + " " * (1 << 20), "at most 1048576 bytes"),
    ],
)
def test_bad_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFileError, match=message):
        ModelConfig.from_directory(tmp_path)


def test_what_no_hugging_face_class_has_is_not_saved() -> None:
    from dataclasses import replace

    config = replace(ModelConfig.from_hf(hf("llama")), attention_bias=True)  # but no output bias
    with pytest.raises(ValueError, match=r"attention.*LlamaForCausalLM cannot express"):
        config.to_hf()


def test_config_is_frozen_and_hashable() -> None:
    config = ModelConfig.from_hf(hf("llama"))
    with pytest.raises(AttributeError):
        config.vocab_size = 5  # type: ignore[misc]
    assert len({config, ModelConfig.from_hf(hf("llama"))}) == 1


def gguf_metadata(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    values = {
        "block_count": 4, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5e5,
    } | changes  # fmt: skip
    return {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in values.items()}}


class Tensor:
    """Stands for a GGUFTensor in what from_gguf looks at."""

    def __init__(self, values: list[float] | None = None) -> None:
        self.type_name = "F32"
        self.shape = (320, 64) if values is None else (len(values),)
        self.data = torch.tensor(values or [0.0]).view(torch.uint8)


def from_gguf(metadata: dict[str, Any], **tensors: Tensor) -> ModelConfig:
    named = {"token_embd.weight": Tensor()} | {f"{k}.weight": v for k, v in tensors.items()}
    return ModelConfig.from_gguf(metadata, named, "x.gguf")  # type: ignore[arg-type]


def test_gguf_keys_give_the_same_config_as_hugging_face() -> None:
    tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    ours = from_gguf(gguf_metadata() | tokens, output=Tensor())
    assert ours == ModelConfig.from_hf(
        hf("llama", rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=512)
    )


def test_gguf_rope_scaling() -> None:
    scaling = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    linear = from_gguf(gguf_metadata(**scaling, **{"rope.scaling.type": "linear"})).rope
    assert (linear.type, linear.factor) == ("linear", 4.0)
    assert from_gguf(gguf_metadata(**{"rope.scale_linear": 4.0})).rope.type == "linear"
    yarn = from_gguf(gguf_metadata("qwen2", **scaling, **{"rope.scaling.type": "yarn"})).rope
    assert (yarn.type, yarn.factor, yarn.original_max_position_embeddings) == ("yarn", 4.0, 128)
    assert yarn.attention_factor == pytest.approx(1.1386294)
    factors = from_gguf(gguf_metadata(), rope_freqs=Tensor([1.0] * 4 + [8.0] * 4)).rope
    assert (factors.type, factors.factors) == ("factors", (1.0,) * 4 + (8.0,) * 4)
    partial = from_gguf(gguf_metadata(**{"rope.dimension_count": 8}))
    assert partial.rotary_dim == 8
    longrope = from_gguf(gguf_metadata(), rope_factors_long=Tensor([2.0] * 8),
                         rope_factors_short=Tensor([1.0] * 8)).rope  # fmt: skip
    assert (longrope.type, longrope.attention_factor) == ("longrope", 1.0)


def test_gguf_frequency_factors_become_a_config_that_transformers_loads(tmp_path: Path) -> None:
    config = from_gguf(gguf_metadata(), rope_freqs=Tensor([1.0] * 4 + [8.0] * 4))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["short_factor"] == [1.0] * 4 + [8.0] * 4


@pytest.mark.parametrize(
    "metadata, message",
    [
        (gguf_metadata("gpt2"), "architecture: 'gpt2' is not supported. Supported: llama, qwen2"),
        ({}, "general.architecture: is missing"),
        (gguf_metadata(block_count="4"), "llama.block_count: must be an integer"),
        (gguf_metadata(block_count=1 << 50), "num_hidden_layers"),
        (gguf_metadata(**{"attention.head_count": [4, 4]}), "attention.head_count"),
        (gguf_metadata(**{"attention.layer_norm_rms_epsilon": float("nan")}), "epsilon"),
        (gguf_metadata(**{"rope.dimension_count": 64}), "rope.dimension_count"),
        (gguf_metadata(**{"rope.scaling.type": "magic"}), "'magic' is not supported"),
        (gguf_metadata(**{"attention.value_length": 8}), "attention.value_length"),
        (gguf_metadata(expert_count=8), "expert_used_count: is missing"),
        (gguf_metadata(expert_count=8, expert_used_count=9), "per_token 9 is more than"),
        (gguf_metadata(expert_count=8, expert_used_count=2, expert_shared_count=1), "only 0 is"),
        (gguf_metadata() | {"split.count": 3}, "split.count.*gguf-split --merge"),
    ],
)
def test_bad_gguf_metadata_is_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        from_gguf(metadata)
    assert "x.gguf" in str(caught.value)


def test_gguf_factors_must_be_finite_and_fit() -> None:
    for values in ([float("nan")] * 8, [1.0] * 3, [0.0] * 8):
        with pytest.raises(ModelFileError, match=r"x\.gguf"):
            from_gguf(gguf_metadata(), rope_freqs=Tensor(values))


def test_rope_config_checks_its_own_values() -> None:
    with pytest.raises(ValueError, match="theta must be from"):
        RopeConfig(theta=1.0)
    with pytest.raises(ValueError, match="needs factors"):
        RopeConfig(type="factors")
