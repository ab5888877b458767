"""QuantConfig: models are quantized as they are read, and are the same when they are read again."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_loading import load, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import inputs, tiny
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import fastllm
from fastllm.integrations.transformers import QuantConfig, quantizer
from fastllm.integrations.transformers.quant_linear import QuantExperts
from fastllm.nn import QuantLinear
from fastllm.nn.packed_matrix import PackedMatrix
from fastllm.nn.quant_embedding import QuantEmbedding
from fastllm.quantize.packed import quantize_weight, unpack
from fastllm.quantize.rule import FallbackWarning

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
OURS = ("smollm", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3")  # which fastllm.LLM reads
pytestmark = pytest.mark.usefixtures("one_quiet_thread")
IDS = inputs((12, 9))["input_ids"]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(ids).logits.float()
    return made


def share(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["smollm", "qwen3", "gemma3", "phi3", *MIXTURES])
def test_a_model_is_quantized_as_it_is_read_and_read_again_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    folder = saved(family, tmp_path, torch.float32)
    plain, model = load(folder), load(folder, format="q8_0", activation="fp32")
    assert model.is_quantized and model.hf_quantizer.is_trainable
    assert not any(p.is_meta for p in model.parameters())
    names = {name for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    assert names and not any("lm_head" in name or name.endswith("gate") for name in names)
    stacked = [m for m in model.modules() if isinstance(m, QuantExperts)]
    assert bool(stacked) == (family in MIXTURES)
    if family not in MIXTURES:  # where a rounded weight may change the experts that are chosen
        assert 0 < share(logits(model), logits(plain)) < 0.03
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.activation == "fp32"
    values = again.dequantize()  # transformers' own method
    assert not values.is_quantized
    assert not any(isinstance(m, PackedMatrix | QuantExperts) for m in values.modules())
    assert share(logits(values), logits(model)) < 1e-5


@pytest.mark.parametrize("family", OURS)
def test_what_transformers_saves_is_what_the_engine_reads(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path, torch.float32)
    model = load(folder, format="q4_1", activation="fp32", embeddings="q8_0")
    model.save_pretrained(tmp_path / "packed")
    formats = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert formats["quant_method"] == "fastllm" and formats["version"] == 1
    with safe_open(tmp_path / "packed/model.safetensors", "pt") as file:
        names = list(file.keys())
        modules = [n.removesuffix(".weight_codes") for n in names if n.endswith("weight_codes")]
    assert set(modules) <= set(formats["formats"])
    assert not any(f"{module}.weight" in names for module in modules)
    llm = fastllm.LLM(tmp_path / "packed", dtype="float32", activation="fp32", max_model_len=64)
    assert share(llm.logits(IDS[0].tolist()), logits(model)[0]) < 1e-5


def test_what_fastllm_quantizes_on_disk_loads_by_its_config_alone(tmp_path: Path) -> None:
    """The command writes no weight_format, and Mixtral's own names."""
    folder = saved("mixtral", tmp_path, torch.float32)
    model = load(folder, format="q4_0", activation="fp32")
    model.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed/model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if not n.endswith("weight_format")}
    assert any("block_sparse_moe.experts.3.w1.weight_codes" in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "packed/config.json").read_text())
    formats = config["quantization_config"]["formats"]
    config["quantization_config"]["formats"] = {
        n: f for n, f in formats.items() if f"{n}.weight_codes" in tensors
    }
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert "weight_format" in str(list(again.state_dict()))
    layer = next(m for m in again.modules() if isinstance(m, QuantLinear))
    assert bytes(layer.weight_format.tolist()) == b"q4_0"


def test_formats_fall_where_rows_do_not_fit_and_a_mix_raises_layers(tmp_path: Path) -> None:
    folder = saved("smollm", tmp_path)
    with pytest.warns(FallbackWarning, match=r"14 of 14 weights are int4_g32, not int4_g128"):
        model = load(folder, format="int4")
    report = model.hf_quantizer.report
    assert len(report.layers) == 14
    assert ("lm_head", "shares its weight with another module") in report.kept
    assert 0 < report.bytes_after < report.bytes_before
    with pytest.warns(FallbackWarning):
        mixed = load(folder, format="q4_k_m", overrides={"k_proj": "nf4", r"1\.mlp\.up": "bf16"})
    formats = mixed.hf_quantizer.formats
    assert "model.layers.1.mlp.up_proj" not in formats
    assert formats["model.layers.0.self_attn.k_proj"] == "int4_g32"  # nf4 needs 64 columns
    downs = [formats[f"model.layers.{i}.mlp.down_proj"] for i in (0, 1)]
    assert downs == ["q5_0", "q8_0"]  # q4_k, and q6_k of the last layer, in rows of 96


def test_what_is_not_to_be_converted_stays_as_it_is(tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path)
    model = load(
        folder, format="q8_0", modules_to_not_convert=["model.layers.0", "lm_head"], experts=False
    )
    packed = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert packed == {f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"}
    assert not any(isinstance(m, QuantExperts) for m in model.modules())
    kept = dict(model.hf_quantizer.report.kept)
    assert kept["model.layers.1.mlp.experts.down_proj"] == "experts=False"
    head = load(folder, format="q8_0", modules_to_not_convert=[])
    assert isinstance(head.lm_head, QuantLinear)


def test_experts_that_no_kernel_serves_are_left_with_the_reason(tmp_path: Path) -> None:
    model = load(saved("gpt_oss", tmp_path), format="q8_0")
    reasons = [why for name, why in model.hf_quantizer.report.kept if "experts" in name]
    served = any(isinstance(m, QuantExperts) for m in model.modules())
    assert served != bool(reasons)
    assert torch.isfinite(logits(model)).all()


def test_the_default_activation_is_int8_and_codes_are_those_of_the_quantizer(
    tmp_path: Path,
) -> None:
    folder = saved("smollm", tmp_path)
    plain, model = load(folder), load(folder, format="q8_0")
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    assert layer.activation == "int8" and layer.dtype == torch.bfloat16
    weight = plain.get_submodule(name).weight.detach()
    assert torch.equal(unpack(layer.packed_weight()), unpack(quantize_weight(weight, "q8_0")))
    assert share(logits(model), logits(plain)) < 0.06


def test_packed_embeddings_stay_tied_through_files_and_back(tmp_path: Path) -> None:
    folder = saved("smollm", tmp_path)
    model = load(folder, format="q8_0", embeddings="q8_0")
    for _ in range(2):
        table, head = model.model.embed_tokens, model.lm_head
        assert isinstance(table, QuantEmbedding) and isinstance(head, QuantLinear)
        assert head.weight_codes is table.weight_codes
        assert share(logits(model), logits(load(folder))) < 0.06
        model.save_pretrained(tmp_path / "packed")
        assert "lm_head.weight_codes" not in load_file(tmp_path / "packed/model.safetensors")
        model = load(tmp_path / "packed")
    plain = model.dequantize()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_it_generates_compiles_copies_and_pickles(tmp_path: Path) -> None:
    model = load(saved("qwen3", tmp_path), format="q8_0", activation="bf16")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(IDS[:1], **options)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(IDS[:1], **options), answer)
    wanted = logits(model)
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 5, 64).bfloat16()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_gradients_pass_to_the_inputs_with_checkpointing_too(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path, torch.float32)
    model = load(folder, format="q8_0", activation="fp32")
    plain = copy.deepcopy(model).dequantize(torch.float32)
    x = 0.1 * torch.randn(1, 7, 64)
    grads = []
    model.train()
    for checkpointing, which in ((False, model), (True, model), (False, plain)):
        if checkpointing:
            named = (
                "activation_checkpointing_enable",
                "gradient_checkpointing_enable",
            )  # by release
            next(getattr(which, n) for n in named if hasattr(which, n))()
        given = x.clone().requires_grad_()
        which(inputs_embeds=given).logits.square().mean().backward()
        grads.append(given.grad)
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-4, atol=1e-6)


def test_shards_other_heads_and_weights_that_files_lack(tmp_path: Path) -> None:
    folder = saved("qwen3", tmp_path)
    plain = tiny("qwen3", torch.bfloat16)
    plain.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    wanted = logits(load(folder, format="q8_0"))
    assert torch.equal(logits(load(tmp_path / "shards", format="q8_0")), wanted)
    config = QuantConfig("q8_0")
    body = transformers.AutoModel.from_pretrained(folder, quantization_config=config)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=QuantConfig("q8_0"), num_labels=3
    )
    for model in (body, judge):
        assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    assert type(judge.score) is torch.nn.Linear and judge(IDS).logits.shape == (2, 3)
    load(folder, format="q8_0").save_pretrained(tmp_path / "packed")
    again = transformers.AutoModel.from_pretrained(tmp_path / "packed")  # without the head
    assert torch.equal(again(IDS).last_hidden_state, body(IDS).last_hidden_state)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]  # which transformers then draws anew
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    drawn = load(folder, format="q8_0")
    assert isinstance(drawn.model.layers[0].mlp.up_proj, QuantLinear)
    assert torch.isfinite(logits(drawn)).all()


def test_no_second_copy_of_the_model_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a weight is rounded, those before it are packed already."""
    folder, seen = saved("qwen3_moe", tmp_path), []
    original = quantizer.FastllmQuantizer.round

    def watched(self: Any, model: Any, name: str, weight: Tensor) -> None:
        original(self, model, name, weight)
        plain = [p for n, p in model.named_parameters() if self.param_needs_quantization(model, n)]
        seen.append(sum(not p.is_meta for p in plain))

    monkeypatch.setattr(quantizer.FastllmQuantizer, "round", watched)
    load(folder, format="q8_0")
    assert len(seen) == 12 and not any(seen)


def test_the_activation_of_a_quantized_model_may_be_named_when_it_is_loaded(
    tmp_path: Path,
) -> None:
    load(saved("qwen3", tmp_path), format="q8_0").save_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match="activation"):
        model = load(tmp_path / "packed", format="q8_0", activation="bf16")
    assert {m.activation for m in model.modules() if isinstance(m, QuantLinear)} == {"bf16"}


def test_quantize_model_saves_what_from_pretrained_reads(tmp_path: Path) -> None:
    model = load(saved("smollm", tmp_path))
    fastllm.quantize_model(model, "q4_1")
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[0].mlp.up_proj.activation == "bf16"


def test_experts_stay_packed_and_saved_when_linear_layers_are_made_plain(tmp_path: Path) -> None:
    model = load(saved("qwen3_moe", tmp_path), format="q8_0", activation="bf16")
    assert fastllm.dequantize_model(model) == 8
    wanted = logits(model)
    model.save_pretrained(tmp_path / "half")
    assert torch.equal(logits(load(tmp_path / "half")), wanted)


def test_layers_that_quantize_model_packs_later_are_saved_with_the_rest(tmp_path: Path) -> None:
    model = load(
        saved("smollm", tmp_path), format="q8_0", embeddings="q8_0", activation="bf16",
        modules_to_not_convert=["down_proj", "lm_head"],
    )  # fmt: skip
    fastllm.quantize_model(model, "q4_0", modules="down_proj")
    wanted = logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), wanted)
    layers = again.model.layers[0].mlp
    assert (layers.down_proj.format, layers.up_proj.format) == ("q4_0", "q8_0")


def test_families_that_draw_the_weights_of_their_children_load_quantized(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    kind = transformers.T5ForConditionalGeneration
    kind(config).save_pretrained(tmp_path / "plain")
    found = []
    for folder, options in (("plain", {"quantization_config": QuantConfig("q8_0")}), ("q", {})):
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            tmp_path / folder, **options
        )
        assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wi, QuantLinear)
        with torch.no_grad():
            found.append(model(input_ids=IDS, labels=IDS).loss)
        model.save_pretrained(tmp_path / "q")
    assert torch.equal(*found)


def test_importing_both_packages_has_registered_it_and_twice_changes_nothing() -> None:
    for _ in range(2):
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["fastllm"] is QuantConfig
        assert AUTO_QUANTIZER_MAPPING["fastllm"] is quantizer.FastllmQuantizer
        quantizer.register()
