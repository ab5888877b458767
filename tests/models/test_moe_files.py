"""Mixtures of experts: configurations, and files in both directions, beside transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import same_greedy, save_model, small_config
from moe_families import (
    FAMILIES,
    PROMPT,
    SIZES,
    families,
    logits_of,
    theirs_of,
    values_of,
)
from safetensors.torch import load_file, save_file

from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import holds_experts
from fastllm.models.gguf_export import export_gguf, export_hf, weights_of
from fastllm.models.hf_layout import hf_tensors
from fastllm.models.loader import load_model, save_pretrained
from fastllm.models.moe_config import MoeConfig
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import initialize, load_trainable
from fastllm.models.weights import SafetensorsWeights, open_weights
from fastllm.testing.small_models import batch_of, config_of

transformers = pytest.importorskip("transformers")


# configurations


@families
def test_a_saved_config_means_what_transformers_takes_it_for(family: str) -> None:
    theirs = theirs_of(family)
    values = theirs.to_dict() | {"architectures": [f"{FAMILIES[family][0]}ForCausalLM"]}
    ours = ModelConfig.from_hf(values)
    assert ours == ModelConfig.from_hf(values_of(family))
    again = type(theirs).from_dict(ours.to_hf())
    meant = {*SIZES, *FAMILIES[family][1], "rope_parameters", "rms_norm_eps"}
    for key in meant - {"pad_token_id"}:  # nothing of the model
        assert getattr(again, key) == getattr(theirs, key), key
    assert ModelConfig.from_hf(ours.to_hf()) == ours


@families
def test_absent_keys_mean_the_defaults_of_the_class(family: str) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 96, "num_hidden_layers": 5}
    sizes |= {"num_attention_heads": 32, "vocab_size": 60000}
    if family == "deepseek_v2":
        sizes |= {"num_experts_per_tok": 6}
    if family == "deepseek_v3":
        sizes |= {"num_key_value_heads": 32}
    name = FAMILIES[family][0]
    theirs = getattr(transformers, f"{name}Config")(**sizes)
    named = {"architectures": [f"{name}ForCausalLM"], "model_type": family}
    ours = ModelConfig.from_hf(named | sizes)
    assert ours == replace(
        ModelConfig.from_hf(named | theirs.to_dict()), bos_token_id=ours.bos_token_id, dtype=None
    )


@families
def test_weights_are_those_of_transformers_model(family: str) -> None:
    name = FAMILIES[family][0]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(theirs_of(family))
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert ModelConfig.from_hf(values_of(family)).weight_shapes() == theirs


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "per_token 5 is more than the num_experts 4"),
        ("mixtral", {"num_local_experts": 0}, "num_experts must be from 1"),
        ("mixtral", {"num_local_experts": 1 << 40}, "num_experts must be from 1"),
        ("mixtral", {"num_local_experts": "many"}, "num_local_experts: must be an integer"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: must be at least 1"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers: must hold integers"),
        ("qwen3_moe", {"mlp_only_layers": [0] * 2000}, "mlp_only_layers: has 2000 items"),
        ("qwen3_moe", {"num_hidden_layers": 1 << 40}, "num_hidden_layers must be from 1"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: clipped queries"),
        ("deepseek_v2", {"topk_method": "random"}, "topk_method: 'random' is not supported"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid' is not supported"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: DeepSeek-V2"),
        ("deepseek_v2", {"n_group": 3}, "num_experts 8 is not a multiple of groups 3"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok: is missing"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: 'greedy' is not supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported"),
        ("deepseek_v3", {"topk_group": 5}, "kept_groups must be from 1 to 4, is 5"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 8}, "top2 needs two experts a group"),
        ("deepseek_v3", {"topk_group": 1}, "per_token 3 is more than 1 groups of 2 hold"),
        ("deepseek_v3", {"routed_scaling_factor": -1.0}, "scale must be positive"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelFileError, match=words):
        ModelConfig.from_hf(values_of(family, **changes))


def test_which_layers_have_experts_is_read_from_every_spelling() -> None:
    def sparse(family: str, **changes: Any) -> list[int]:
        config = ModelConfig.from_hf(values_of(family, num_hidden_layers=6, **changes))
        return [layer for layer in range(6) if config.experts_of(layer) is not None]

    assert sparse("mixtral") == [0, 1, 2, 3, 4, 5]
    assert sparse("qwen3_moe", mlp_only_layers=[0, 4]) == [1, 2, 3, 5]
    assert sparse("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=3) == [2, 5]
    assert sparse("qwen3_moe", mlp_only_layers=[5], decoder_sparse_step=2) == [1, 3]
    assert sparse("deepseek_v3", first_k_dense_replace=2) == [2, 3, 4, 5]
    assert sparse("deepseek_v3", first_k_dense_replace=9) == []
    assert sparse("deepseek_v2", n_routed_experts=None) == []
    assert ModelConfig.from_hf(values_of("deepseek_v2", n_routed_experts=None)).experts is None


def test_experts_and_the_model_type_belong_together() -> None:
    config = ModelConfig.from_hf(values_of("olmoe"))
    with pytest.raises(ValueError, match="olmoe needs experts"):
        replace(config, experts=None)
    with pytest.raises(ValueError, match="llama has no experts"):
        replace(config, model_type="llama")
    with pytest.raises(ValueError, match="names layer 2 of 2"):
        replace(config, experts=replace(config.experts, dense_layers=(2,)))
    with pytest.raises(ValueError, match="cannot express"):
        replace(config, experts=replace(config.experts, scale=2.0)).to_hf()
    with pytest.raises(ValueError, match="must ascend"):
        MoeConfig(num_experts=4, per_token=1, moe_intermediate_size=8, dense_layers=(1, 0))


# files


@families
def test_logits_are_those_of_transformers(
    family: str, models: Callable[[str], tuple[Any, Path]]
) -> None:
    theirs, directory = models(family)
    want = logits_of(theirs)
    packed = load_model(directory, dtype="float32")
    trained = load_trainable(directory, dtype="float32")
    documents, _ = batch_of([PROMPT])
    with torch.no_grad():
        for model in (packed, trained):
            got = model.logits(model.train_hidden(documents))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@families
def test_saved_models_are_the_files_that_transformers_saves(
    family: str, models: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    theirs, directory = models(family)
    wanted = load_file(directory / "model.safetensors")
    trained = load_trainable(directory)
    packed = load_model(directory)
    export_hf(weights_of(trained), tmp_path / "exported", "f32", None)
    export_hf(weights_of(packed), tmp_path / "unpacked", "f32", None)
    export_hf(weights_of(open_weights(directory)), tmp_path / "copied", "f32", None)
    save_pretrained(trained, tmp_path / "trained")
    save_pretrained(packed, tmp_path / "packed")
    for name in ("exported", "unpacked", "copied", "trained", "packed"):
        saved = load_file(tmp_path / name / "model.safetensors")
        assert set(saved) == set(wanted), name
        for key, tensor in wanted.items():
            assert torch.equal(saved[key], tensor), (name, key)
    again = type(theirs).from_pretrained(tmp_path / "packed", experts_implementation="eager")
    assert torch.equal(logits_of(again), logits_of(theirs))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_files_with_a_layers_experts_in_one_tensor_are_read(
    family: str, models: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    theirs, directory = models(family)
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert any(holds_experts(name) for name in state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    fused, separate = load_trainable(tmp_path).weights(), load_trainable(directory).weights()
    assert list(fused) == list(separate)
    for name, tensor in separate.items():
        assert torch.equal(fused[name], tensor), name
    packed = hf_tensors(load_model(tmp_path))
    for name, tensor in hf_tensors(load_model(directory)).items():
        assert torch.equal(packed[name], tensor), name


def test_experts_are_read_one_by_one(
    models: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    get = SafetensorsWeights.get

    def only_small(self: SafetensorsWeights, name: str) -> Any:
        assert not holds_experts(name)
        return get(self, name)

    monkeypatch.setattr(SafetensorsWeights, "get", only_small)
    _, directory = models("mixtral")
    load_model(directory)
    load_trainable(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "block_sparse_moe.experts.3.w3.weight: the weight is missing"),
        ("narrow", r"w2.weight: has shape \[64, 79\], the configuration says \[64, 80\]"),
        ("extra", "experts.4.w1.weight: is not a weight of the configured model"),
        ("twice", "is the same weight as"),
    ],
)
def test_wrong_files_are_named(
    change: str, words: str, models: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, directory = models("mixtral")
    tensors = load_file(directory / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe.experts."
    if change == "missing":
        del tensors[f"{prefix}3.w3.weight"]
    elif change == "narrow":
        tensors[f"{prefix}2.w2.weight"] = torch.ones(64, 79)
    elif change == "extra":
        tensors[f"{prefix}4.w1.weight"] = torch.ones(80, 64)
    else:
        tensors["model.layers.0.mlp.experts.1.w1.weight"] = torch.ones(80, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(ModelFileError, match=words):
        load_model(tmp_path)


def test_a_config_without_generation_tokens_is_saved_as_it_is(tmp_path: Path) -> None:
    model = initialize(config_of("deepseek v3 experts"), dtype=torch.float32)
    save_pretrained(model, tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["num_nextn_predict_layers"] == 0 and saved["first_k_dense_replace"] == 1
    assert load_model(tmp_path / "m").config == replace(model.config, dtype=torch.float32)


# GGUF


@pytest.mark.parametrize("case", ["mixtral", "qwen3 moe", "olmoe"])
def test_gguf_files_hold_the_model(case: str, tmp_path: Path) -> None:
    config = config_of(case)
    assert config.experts is not None
    config = replace(config, experts=replace(config.experts, dense_layers=()))
    model = initialize(config, dtype=torch.float32)
    export_gguf(weights_of(model), tmp_path / "m.gguf", "f32", None)
    again = load_trainable(tmp_path / "m.gguf", dtype="float32")
    assert again.config.experts == config.experts
    assert again.config.model_type == config.model_type
    for name, tensor in model.weights().items():
        assert torch.equal(again.weights()[name], tensor), name
    packed = hf_tensors(load_model(tmp_path / "m.gguf", dtype="float32"))
    for name, tensor in hf_tensors(model).items():
        assert torch.equal(packed[name], tensor), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_llama_cpp_gives_the_same_greedy_tokens_of_mixtures(
    kind: str, tokenizer: Tokenizer, llama_cpp: Any, tmp_path: Path
) -> None:
    """In float32: llama.cpp rounds what meets narrower weights, and routers choose otherwise."""
    width = 64 if kind == "qwen3_moe" else 192
    experts = MoeConfig(
        num_experts=4, per_token=2, moe_intermediate_size=width, renormalize=kind != "olmoe"
    )
    config = small_config(
        kind, tokenizer.vocab_size, experts=experts, qk_norm_whole=kind == "olmoe"
    )
    if kind == "olmoe":
        config = replace(config, num_key_value_heads=4)
    folder = save_model(tmp_path / "model", config, tokenizer)
    same_greedy(llama_cpp, folder, tmp_path / "model.gguf", "f32", tokenizer)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("qwen3 moe", {}, r"dense_layers=\(1,\) has no GGUF form in architecture 'qwen3moe'"),
        ("olmoe", {"renormalize": True}, "renormalize=True has no GGUF form"),
        ("deepseek v2 experts", {}, "'deepseek_v2' cannot be exported to GGUF"),
    ],
)
def test_what_gguf_cannot_say_is_refused(
    case: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = config_of(case)
    assert config.experts is not None
    config = replace(config, experts=replace(config.experts, **changes))
    with pytest.raises(ValueError, match=words):
        export_gguf(weights_of(initialize(config)), tmp_path / "m.gguf", "f32", None)
