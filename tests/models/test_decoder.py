"""The decoder against transformers: every architecture, scaling and option, and round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm import LLM
from fastllm.errors import ModelFileError
from fastllm.models.loader import load_model, save_pretrained
from fastllm.models.safetensors_files import SafetensorsFiles
from fastllm.models.weights import open_weights

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, **ROPE,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **ROPE}
MSCALES = {"mscale": 1.0, "mscale_all_dim": 0.8}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24,
    "v_head_dim": 40, "first_k_dense_replace": 2,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama wide heads": ("Llama", {"head_dim": 64}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **ROPE}}),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 24}),
    "mistral window of a page": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied, window": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 20,
         "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3 tied, biases": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "deepseek v3 yarn": (
        "DeepseekV3",
        LATENT | {"q_lora_rank": 28, "rope_parameters": YARN | MSCALES},
    ),
    "deepseek v3 half-split, biases": (
        "DeepseekV3",
        LATENT | {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
    ),
    "deepseek v2": ("DeepseekV2", LATENT | {"q_lora_rank": 28, "mlp_bias": True}),
    "deepseek v2-lite": ("DeepseekV2", LATENT | {"q_lora_rank": None}),
}  # fmt: skip


def _reference(case: str) -> Any:
    kind, options = CASES[case]
    options = {**SIZES, **options}
    if kind == "Qwen2" or kind.startswith("Deepseek"):
        options.pop("head_dim")  # hidden_size / heads, or the sizes of latent attention
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():  # biases and norms start as 0 and 1
        scale = 0.3
        if parameter.ndim > 1:
            table = "embed" in name or "lm_head" in name
            scale = 0.3 if table else 1.5 / parameter.shape[-1] ** 0.5
        torch.nn.init.normal_(parameter, float("norm" in name), scale)
    return model


def _ids(count: int) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model = _reference(case)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    ids = _ids(150)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    llm = LLM(tmp_path / "hf", dtype="float32", max_num_batched_tokens=70)
    got = llm.logits(ids)
    assert got.dtype == torch.float32 and got.shape == (150, 320)
    assert want.abs().max() > 1
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_is_the_model_that_was_loaded(case: str, tmp_path: Path) -> None:
    model = _reference(case)
    model.save_pretrained(tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    save_pretrained(loaded, tmp_path / "ours")
    before, after = SafetensorsFiles.open(tmp_path / "hf"), SafetensorsFiles.open(tmp_path / "ours")
    assert set(before.entries) == set(after.entries)
    for name in before.entries:
        assert before.get(name).format == after.get(name).format
        assert torch.equal(before.get(name).data, after.get(name).data), name
    again = type(model).from_pretrained(tmp_path / "ours")
    ids = torch.tensor([_ids(40)])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_directories_compute_in_bfloat16(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _reference("llama tied").to(dtype)
    model.save_pretrained(tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    assert loaded.dtype == torch.bfloat16 and loaded.activation == "bf16"
    ids = _ids(60)
    with torch.no_grad():
        peer = model.bfloat16()(torch.tensor([ids])).logits[0].float()
        exact_model = model.from_pretrained(tmp_path / "hf", dtype="float32")
        want = exact_model(torch.tensor([ids])).logits[0]
    got = LLM(tmp_path / "hf").logits(ids)
    assert (got - want).norm() < (peer - want).norm()
    exact = LLM(tmp_path / "hf", dtype="float32").logits(ids)
    torch.testing.assert_close(exact, want, atol=1e-4, rtol=0)


def test_names_of_parameters_are_hugging_faces(tmp_path: Path) -> None:
    model = _reference("qwen3")
    model.save_pretrained(tmp_path / "hf")
    source = open_weights(tmp_path / "hf")
    empty = load_model(source)
    from fastllm.models.decoder import Decoder

    fresh = Decoder(
        source.config, dtype=torch.float32, activation="fp32", max_positions=8,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert set(empty.state_dict()) == {n for n in model.state_dict() if "norm" in n}


def test_a_tied_head_shares_one_packed_weight(tmp_path: Path) -> None:
    _reference("llama tied").save_pretrained(tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    assert loaded.lm_head.packed is loaded.model.embed_tokens.packed
    layer = loaded.model.layers[0]
    assert layer.self_attn.qkv.packed is not None and layer.mlp.gate_up.packed is not None
    assert all(m.weight is None and m.packed is None for m in layer.self_attn.qkv.members)


def test_missing_and_wrong_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _reference("llama").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for change in ("missing", "shape", "unexpected", "dtype"):
        changed = dict(tensors)
        if change == "missing":
            del changed[name]
        elif change == "shape":
            changed[name] = tensors[name].t().contiguous()
        elif change == "unexpected":
            changed["model.layers.1.mlp.up_proj.extra"] = tensors[name].clone()
        else:
            changed[name] = tensors[name].int()
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ModelFileError, match=r"model\.layers\.1\.mlp\.up_proj"):
            load_model(tmp_path / "hf")


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    _reference("llama").save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="does not fit dtype"):
        load_model(tmp_path / "hf", dtype="float32", activation="bf16")
    with pytest.raises(ValueError, match="needs quantized weights"):
        load_model(tmp_path / "hf", activation="int8")
    with pytest.raises(ValueError, match="dtype must be"):
        load_model(tmp_path / "hf", dtype="float16")
    assert load_model(tmp_path / "hf", activation="fp32").dtype == torch.float32
