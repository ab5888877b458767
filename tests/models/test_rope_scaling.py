"""Rope tables against transformers' own functions, for every scaling type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastllm.models.config import ModelConfig
from fastllm.models.rope_scaling import rope_frequencies, rope_tables

CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
             "original_max_position_embeddings": 1024},
    "yarn betas": {"rope_type": "yarn", "factor": 40.0, "rope_theta": 1e4, "beta_fast": 16.0,
                   "beta_slow": 2.0, "original_max_position_embeddings": 256, "truncate": False},
    "yarn mscale": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "mscale": 0.7,
                    "mscale_all_dim": 1.2, "original_max_position_embeddings": 512},
    "yarn attention": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4,
                       "attention_factor": 0.9, "original_max_position_embeddings": 512},
    "yarn implied factor": {"rope_type": "yarn", "factor": None, "rope_theta": 1e4,
                            "original_max_position_embeddings": 512},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4,
                 "short_factor": [1 + 0.1 * i for i in range(32)],
                 "long_factor": [1 + 2.0 * i for i in range(32)],
                 "original_max_position_embeddings": 1024},
    "longrope factor": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 16.0,
                        "short_factor": [1.0] * 32, "long_factor": [4.0] * 32,
                        "original_max_position_embeddings": 1024},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 1024},
}  # fmt: skip


def configs(parameters: dict[str, Any]) -> tuple[ModelConfig, LlamaConfig]:
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320,
        "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 4096,
        "rope_parameters": parameters,
    }  # fmt: skip
    return ModelConfig.from_hf(values), LlamaConfig(**values | {"rope_parameters": {**parameters}})


@pytest.mark.parametrize("length", [100, 4096, 20_000])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_attention_factor_are_those_of_transformers(case: str, length: int) -> None:
    ours, theirs = configs(CASES[case])
    if case == "default":
        expected, attention_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        function = ROPE_INIT_FUNCTIONS[ours.rope.type]
        expected, attention_factor = function(theirs, None, seq_len=length)
    frequencies, factor = rope_frequencies(ours, length)
    assert frequencies.dtype == torch.float64
    torch.testing.assert_close(frequencies.float(), expected, rtol=2e-6, atol=0)
    assert factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_the_transformers_module(case: str) -> None:
    ours, theirs = configs(CASES[case])
    positions = torch.arange(1024)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[None])
    our_cos, our_sin = rope_tables(ours, 1024)
    assert our_cos.shape == (1024, 32)
    assert our_cos.dtype == torch.float32
    # transformers multiplies in float32: 1023 radians carry an error of 2^-24 * 1023 = 6e-5
    torch.testing.assert_close(our_cos, cos[0, :, :32], rtol=0, atol=3e-4)
    torch.testing.assert_close(our_sin, sin[0, :, :32], rtol=0, atol=3e-4)


def test_tables_are_exact_far_out() -> None:
    """Rounded once from float64, also across the chunks that a long table is computed in."""
    ours, _ = configs(CASES["default"])
    cos, _ = rope_tables(ours, 20_001)
    frequencies, _ = rope_frequencies(ours, 20_001)
    for position in (0, 8191, 8192, 20_000):
        assert torch.equal(cos[position], (position * frequencies).cos().float())


def test_a_longer_table_begins_with_the_shorter_one() -> None:
    for case in ("default", "yarn", "llama3", "linear"):
        ours, _ = configs(CASES[case])
        assert torch.equal(rope_tables(ours, 9000)[1][:100], rope_tables(ours, 100)[1])


def test_explicit_factors_divide_the_frequencies() -> None:
    llama3, _ = configs(CASES["llama3"])
    base, _ = rope_frequencies(configs(CASES["default"])[0], 100)
    scaled, _ = rope_frequencies(llama3, 100)
    values = llama3.to_hf() | {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 5e5, "attention_factor": 1.0,
        "short_factor": (base / scaled).tolist(), "long_factor": (base / scaled).tolist(),
        "original_max_position_embeddings": 1024}}  # fmt: skip
    from dataclasses import replace

    from fastllm.models.rope_scaling import RopeConfig

    factors = RopeConfig(type="factors", theta=5e5, factors=tuple((base / scaled).tolist()))
    ours = replace(llama3, rope=factors)
    torch.testing.assert_close(rope_frequencies(ours, 100)[0], scaled, rtol=1e-12, atol=0)
    saved = ModelConfig.from_hf(ours.to_hf())  # Hugging Face knows them as a longrope
    torch.testing.assert_close(rope_frequencies(saved, 100)[0], scaled, rtol=1e-12, atol=0)
    assert ModelConfig.from_hf(values).rope.long_factor == ours.rope.factors


def test_partial_rotation_uses_the_rotary_dimension() -> None:
    ours, _ = configs({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5,
                       "rope_theta": 1e4})  # fmt: skip
    _, theirs = configs(CASES["linear"])
    theirs.rope_parameters |= {"factor": 2.0, "partial_rotary_factor": 0.5}
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](theirs, None)
    assert expected.numel() == 16
    torch.testing.assert_close(rope_frequencies(ours, 64)[0].float(), expected, rtol=2e-6, atol=0)


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="max_positions"):
        rope_tables(configs(CASES["default"])[0], 0)
