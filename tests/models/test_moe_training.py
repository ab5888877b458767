"""Mixtures of experts train: gradients, fresh weights, learning, adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import PROMPT, chosen, families, some

from fastllm import LLM
from fastllm.models.adapters import load_adapter, save_adapter
from fastllm.models.expert_files import holds_experts
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.hf_layout import in_file_order
from fastllm.models.loader import save_pretrained
from fastllm.models.trainable import initialize, load_trainable
from fastllm.models.weights import open_weights
from fastllm.nn.lora import LoraConfig, adapted, add_lora, lora_parameters
from fastllm.testing.plain_decoder import plain_loss
from fastllm.testing.small_models import (
    SPARSE,
    batch_of,
    config_of,
    model_of,
    random_documents,
)
from fastllm.train.optim import AdamW


@families
def test_gradients_are_those_of_transformers(
    family: str, models: Callable[[str], tuple[Any, Path]]
) -> None:
    theirs, directory = models(family)
    documents = random_documents((33, 12))
    theirs.zero_grad()
    loss = sum(
        torch.nn.functional.cross_entropy(
            theirs(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum"
        )
        for ids in documents
    )
    loss.backward()
    ours = load_trainable(directory, dtype="float32")
    found = ours.loss(*batch_of(documents))
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for name, parameter in theirs.named_parameters():
        got = in_file_order(ours.weights()[name].grad, name, ours.config)
        assert got is not None, name
        error = float((got - parameter.grad).norm() / parameter.grad.norm())
        assert error < 1e-3, (name, error)


@pytest.mark.parametrize("case", SPARSE)
def test_float32_gradients_are_those_of_float64_autograd(case: str) -> None:
    model, documents = model_of(case, torch.float32), random_documents((33, 1, 70))
    exact = {n: p.detach().double() for n, p in model.weights().items()}
    for tensor in exact.values():
        tensor.requires_grad_()
    wanted = plain_loss(model.config, exact, documents)
    wanted.backward()
    for checkpoint in (False, True)[: 2 if case == "qwen3 moe" else 1]:
        model.zero_grad()
        loss = model.loss(*batch_of(documents), checkpoint=checkpoint)
        loss.backward()
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
        for name, parameter in model.named_parameters():
            want = exact[name].grad
            error = float((parameter.grad.double() - want).norm() / want.norm())
            assert error < 1e-4, (name, error)


@pytest.mark.parametrize(
    "case",
    some(["qwen3 moe", "deepseek v3 experts"], ["mixtral"], ["olmoe"], ["deepseek v2 experts"]),
)
def test_a_model_learns_a_batch_by_heart(case: str) -> None:
    model = initialize(config_of(case), dtype=torch.bfloat16)
    batch = batch_of(random_documents((24, 24)))
    optimizer = AdamW([{"params": list(model.parameters()), "lr": 0.02}])
    losses = []
    for _ in range(25):
        loss = model.loss(*batch, reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 0.5, losses[::6]


def test_fresh_experts_do_not_depend_on_one_another() -> None:
    config = config_of("mixtral")
    fewer = replace(config, experts=replace(config.experts, num_experts=3))
    all_weights = initialize(config, seed=1).weights()
    for name, tensor in initialize(fewer, seed=1).weights().items():
        if holds_experts(name):
            assert torch.equal(tensor, all_weights[name][:3]), name
    gate_up = all_weights["model.layers.0.mlp.experts.gate_up_proj"].float()
    down = all_weights["model.layers.0.mlp.experts.down_proj"].float()
    deviation = (0.4 / config.hidden_size) ** 0.5
    assert gate_up.std().item() == pytest.approx(deviation, rel=0.02)
    assert down.std().item() == pytest.approx(deviation / 2, rel=0.02)  # two layers
    assert not torch.equal(gate_up[0], gate_up[1])


def test_gradients_of_bfloat16_experts_are_collected_in_float32() -> None:
    model = initialize(config_of("olmoe"), dtype=torch.bfloat16)
    model.loss(*batch_of(random_documents((20,)))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


# adapters


@pytest.mark.parametrize("case", ["mixtral", "deepseek v2 experts"])
def test_adapters_train_on_attention_and_shared_parts(case: str, tmp_path: Path) -> None:
    model = model_of(case, torch.bfloat16)
    parameters = add_lora(model, LoraConfig(r=4, alpha=8), seed=1)
    names = {name.rpartition(".")[2] for name, _ in adapted(model)}
    shared = {"gate_proj", "up_proj", "down_proj"} if "deepseek" in case else set()
    assert names >= {"o_proj", *shared}
    assert not any(".experts." in name for name, _ in adapted(model))
    llm = LLM.from_model(model, max_model_len=128)
    for step in range(2):
        ((ids, got),) = chosen(llm, [PROMPT])
        if "deepseek" not in case:
            logp, _ = model.log_probs(*batch_of([PROMPT + ids]))
            assert got == logp[len(PROMPT) - 1 : -1].tolist()
        model.loss(*batch_of(random_documents((30,), seed=step))).backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.05 * parameter.grad.sign().to(parameter.dtype)
                parameter.grad = None
    save_adapter(model, tmp_path)
    again = model_of(case, torch.bfloat16)
    load_adapter(again, tmp_path)
    assert lora_parameters(again).keys() == lora_parameters(model).keys()
    with torch.no_grad():
        documents, _ = batch_of([PROMPT])
        assert torch.equal(again.train_hidden(documents), model.train_hidden(documents))


@pytest.mark.parametrize("target", ["experts", "gate_up_proj", "mlp.gate", "experts.0.up_proj"])
def test_experts_and_routers_take_no_adapter(target: str) -> None:
    model = model_of("mixtral", torch.float32)
    with pytest.raises(ValueError, match=f"{target}.*Experts and routers take none"):
        add_lora(model, LoraConfig(target_modules=("q_proj", target)))
    assert {name.rpartition(".")[2] for name, _ in adapted(model)} == set()


def test_quantized_experts_stay_packed_and_train_adapters(tmp_path: Path) -> None:
    config = replace(config_of("qwen3 moe"), hidden_size=64, intermediate_size=96)
    assert config.experts is not None
    experts = replace(config.experts, moe_intermediate_size=32, dense_layers=())
    model = initialize(replace(config, experts=experts), dtype=torch.float32)
    export_gguf(weights_of(model), tmp_path / "m.gguf", "q8_0", None)
    loaded = load_trainable(tmp_path / "m.gguf")
    packs = [pack for layer in loaded.model.layers for pack in layer.mlp.experts.packs()]
    assert {pack.format for pack in packs} == {"q8_0"} and len(packs) == 6
    wanted = weights_of(open_weights(tmp_path / "m.gguf"))
    got = weights_of(loaded)
    for name in loaded.config.weight_shapes():
        if holds_experts(name):
            assert torch.equal(got.values(name), wanted.values(name)), name
    with pytest.raises(ValueError, match=r"q8_0.*Hugging Face directory cannot"):
        save_pretrained(loaded, tmp_path / "hf")
    parameters = add_lora(loaded, LoraConfig(r=4))
    documents = batch_of(random_documents((30,)))
    first = 0.0
    for _ in range(12):
        loss = loaded.loss(*documents, reduction="mean")
        loss.backward()
        first = first or loss.item()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.02 * parameter.grad.sign().to(parameter.dtype)
                parameter.grad = None
    assert loss.item() < 0.8 * first
