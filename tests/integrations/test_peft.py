"""PEFT on packed layers: nothing to ask for, one rounding, files that the engine reads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import inputs, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

import fastllm
from fastllm.integrations.transformers import QuantConfig
from fastllm.nn import QuantLinear

peft = pytest.importorskip("peft")
ours = pytest.importorskip("fastllm.integrations.peft")

# PEFT asks transformers by names that transformers is about to drop
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("one_quiet_thread"),
]
IDS = inputs((12, 9))["input_ids"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    tiny("smollm", torch.bfloat16).save_pretrained(folder)
    return folder


def quantized(folder: Path, **config: Any) -> Any:
    config = {"format": "q8_0", **config}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantConfig(**config))


def adapted(model: Any, **config: Any) -> Any:
    """With random factors, so that the adapter does something."""
    config = {"r": 4, "target_modules": "all-linear", **config}
    made = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(IDS).logits.float()
    return made


def test_adapters_train_in_a_trainer_and_the_base_stays(base: Path, tmp_path: Path) -> None:
    model = peft.prepare_model_for_kbit_training(quantized(base))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    frozen = {k: t.clone() for k, t in model.state_dict().items() if "lora_" not in k}
    data = [{"input_ids": row, "labels": row} for row in IDS[:1].repeat(16, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, learning_rate=2e-2,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Trainer's own
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    for name, tensor in model.state_dict().items():
        assert "lora_" in name or torch.equal(tensor, frozen[name]), name


def test_saved_adapters_give_equal_outputs_here_and_in_the_engine(
    base: Path, tmp_path: Path
) -> None:
    model = adapted(quantized(base))
    wanted = logits(model)
    assert not torch.equal(wanted, logits(quantized(base)))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(base), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    quantized(base).save_pretrained(tmp_path / "packed")
    llm = fastllm.LLM(
        tmp_path / "packed", adapter=tmp_path / "adapter", activation="bf16", max_model_len=64
    )
    theirs = llm.logits(IDS[0].tolist())
    assert float((theirs - wanted[0]).norm() / wanted[0].norm()) < 0.02  # its residual is float32


def test_factors_that_are_written_to_in_evaluation_count_at_once(base: Path) -> None:
    model = adapted(quantized(base))
    first = logits(model)
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    for factor in factors:  # as copies that follow a trained model are written: no version counts
        before = factor._version
        factor.data.mul_(2)
        assert factor._version == before
    assert not torch.equal(logits(model), first)
    for factor in factors:
        factor.data.div_(2)
    assert torch.equal(logits(model), first)


def test_adapters_take_every_layer_out_of_int8_unless_it_was_asked_for(base: Path) -> None:
    model = adapted(quantized(base), target_modules=["q_proj"])
    assert {m.activation for m in model.modules() if isinstance(m, QuantLinear)} == {"bf16"}
    asked = adapted(quantized(base, activation="int8"), target_modules=["q_proj"])
    assert {m.activation for m in asked.modules() if isinstance(m, QuantLinear)} == {"int8"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_layer_gives_what_peft_gives_and_its_gradients(
    dtype: torch.dtype, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=QuantConfig("q8_0")
    )
    model = adapted(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert isinstance(layer, ours.QuantLoraLinear)
    x = torch.randn(3, 5, 96).to(dtype)
    changed = layer(x.clone().requires_grad_())
    changed += 1  # which autograd forbids of views
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(ours.QuantLoraLinear, "_term", lambda *_: None)
        given = x.clone().requires_grad_()
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        y = layer(given)
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (given, *factors))])
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y.detach(), rtol=1e-2, atol=1e-2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert float(((mine - theirs).norm() / theirs.norm()).detach()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_inside_autocast_gives_the_same_gradients(
    dtype: torch.dtype, base: Path
) -> None:
    config = QuantConfig("q8_0")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config)
    model = adapted(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 5, 96).to(dtype).requires_grad_()
    results = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().square().sum()
            if inside:
                results.append(torch.autograd.grad(loss, (x, *factors)))
    results.append(torch.autograd.grad(loss, (x, *factors)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "config",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}],
)
def test_what_the_fused_layer_does_not_know_is_pefts(
    config: dict[str, Any], tmp_path: Path
) -> None:
    tiny("qwen2", torch.float32).save_pretrained(tmp_path)  # has biases, which lora_bias needs
    model = quantized(tmp_path, activation="fp32")
    plain = adapted(quantized(tmp_path, activation="fp32").dequantize(), **config)
    made = adapted(model, **config)
    assert any(isinstance(m, ours.QuantLoraLinear) for m in made.modules())
    made.load_state_dict(
        {k: t for k, t in plain.state_dict().items() if "lora_" in k}, strict=False
    )
    torch.testing.assert_close(logits(made), logits(plain), rtol=1e-4, atol=1e-4)
    made.train()
    if "lora_dropout" in config:
        torch.manual_seed(0)
        first = logits(made)
        assert not torch.equal(first, logits(made))


def test_several_adapters_and_disabled_ones(base: Path) -> None:
    plain = logits(quantized(base, activation="bf16"))
    model = adapted(quantized(base))
    one = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("other")
    assert torch.equal(logits(model), plain)  # B is zero
    model.set_adapter("default")
    assert torch.equal(logits(model), one)


def test_merging_is_refused_until_the_model_is_plain(base: Path) -> None:
    model = adapted(quantized(base))
    wanted = logits(model)
    with pytest.raises(RuntimeError, match=r"fastllm\.dequantize_model"):
        model.merge_and_unload()
    assert torch.equal(logits(model), wanted)
    assert fastllm.dequantize_model(model) == 14
    merged = model.merge_and_unload()
    assert not any(isinstance(m, QuantLinear) for m in merged.modules())
    assert float((logits(merged) - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_a_refused_merge_has_merged_no_layer(base: Path, way: str) -> None:
    model = adapted(quantized(base, modules_to_not_convert=["model.layers.0", "lm_head"]))
    with pytest.raises(RuntimeError, match=r"fastllm\.dequantize_model"):
        getattr(model, way)()
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) == 14 and not any(layer.merged for layer in layers)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_other_methods_of_peft_train_on_packed_layers(base: Path) -> None:
    ada = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=4, tinit=1, tfinal=1)
    ada.target_modules = ["q_proj", "down_proj"]
    table = peft.LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"])
    ia3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    for config in (ada, table, ia3):
        model = peft.get_peft_model(quantized(base, embeddings="q8_0"), config)
        model.train()
        model(IDS, labels=IDS).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and any(p.grad is not None and p.grad.any() for p in trained)
    with pytest.raises(ValueError, match=r"modules_to_save names lm_head, whose weight is packed"):
        peft.get_peft_model(
            quantized(base, embeddings="q8_0"),
            peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        )


def test_registering_twice_wraps_once() -> None:
    from peft.tuners.lora import model as peft_model

    before = peft_model.dispatch_default
    ours.register()
    assert peft_model.dispatch_default is before
    assert not hasattr(before.fastllm_original, "fastllm_original")
