"""Training: whole-model gradients, packing, checkpointing, fresh models and models from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllm.models.decoder import Decoder
from fastllm.models.loader import load_model, save_pretrained
from fastllm.models.trainable import initialize, load_trainable
from fastllm.nn.batch import Documents
from fastllm.testing.plain_decoder import plain_loss
from fastllm.testing.random_model import SIZES
from fastllm.testing.small_models import (
    CONFIGS,
    batch_of,
    config_of,
    model_of,
    random_documents,
)

LENGTHS = (33, 1, 70, 12)


def _gradients(model: Decoder, documents: list[list[int]], checkpoint: bool = False) -> dict:
    model.zero_grad()
    loss = model.loss(*batch_of(documents), checkpoint=checkpoint)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return found | {"loss": loss.detach()}


def _plain_gradients(model: Decoder, documents: list[list[int]], dtype: torch.dtype) -> dict:
    weights = {n: p.detach().to(dtype).requires_grad_() for n, p in model.named_parameters()}
    loss = plain_loss(model.config, weights, documents)
    loss.backward()
    return {name: w.grad for name, w in weights.items()} | {"loss": loss.detach()}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", CONFIGS)
def test_float32_gradients_are_those_of_float64_autograd(case: str) -> None:
    model, documents = model_of(case, torch.float32), random_documents(LENGTHS)
    exact = _plain_gradients(model, documents, torch.float64)
    peer = _plain_gradients(model, documents, torch.float32)
    found = _gradients(model, documents)
    assert set(found) == set(exact)
    for name, gradient in found.items():
        bound = max(3 * _error(peer[name], exact[name]), 2e-6)
        assert _error(gradient, exact[name]) <= bound, name


@pytest.mark.parametrize("case", CONFIGS)
def test_bfloat16_gradients_are_as_near_as_plain_bfloat16(case: str) -> None:
    model, documents = model_of(case, torch.bfloat16), random_documents(LENGTHS)
    exact = _plain_gradients(model, documents, torch.float64)
    peer = _plain_gradients(model, documents, torch.bfloat16)
    found = _gradients(model, documents)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert _error(gradient, exact[name]) <= max(1.5 * _error(peer[name], exact[name]), 0.01), (
            name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama tied, biases", "qwen3", "deepseek v3"])
def test_recomputed_layers_give_the_same_bits(case: str, dtype: torch.dtype) -> None:
    model, documents = model_of(case, dtype), random_documents(LENGTHS)
    kept = _gradients(model, documents)
    recomputed = _gradients(model, documents, checkpoint=True)
    for name, gradient in kept.items():
        assert torch.equal(recomputed[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_do_not_see_each_other(dtype: torch.dtype) -> None:
    model, documents = model_of("qwen3", dtype), random_documents(LENGTHS)
    packed = model.train_hidden(Documents.pack(documents)).split(LENGTHS)
    for ids, rows in zip(documents, packed, strict=True):
        assert torch.equal(model.train_hidden(Documents.pack([ids])), rows)
    (gradient,) = torch.autograd.grad(
        packed[2].float().sum(), model.model.embed_tokens.weight, retain_graph=True
    )
    strangers = sorted({t for ids in documents for t in ids} - set(documents[2]))
    assert strangers
    assert not gradient[strangers].any()


def test_order_and_accumulation_change_gradients_by_rounding_alone() -> None:
    model, documents = model_of("llama", torch.float32), random_documents(LENGTHS)
    whole = _gradients(model, documents)
    turned = _gradients(model, documents[::-1])
    model.zero_grad()
    for ids in documents:
        model.loss(*batch_of([ids])).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(turned[name], whole[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_threads_run_or_time() -> None:
    model, documents = model_of("llama tied, biases", torch.bfloat16), random_documents(LENGTHS)
    first = _gradients(model, documents)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        again = _gradients(model, documents)
        for name, gradient in first.items():
            assert torch.equal(again[name], gradient), f"{name}, {threads} threads"


def test_the_hidden_states_of_training_are_those_of_the_loss_functions() -> None:
    model, documents = model_of("llama", torch.float32), random_documents(LENGTHS)
    packed, targets = batch_of(documents)
    logits = model.logits(model.train_hidden(packed))
    logp, entropy = model.log_probs(packed, targets, temperature=0.7)
    scaled = torch.log_softmax(logits / 0.7, -1)
    places = targets >= 0
    wanted = scaled[places].gather(1, targets[places, None])[:, 0]
    torch.testing.assert_close(logp[places], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        entropy[places], -(scaled.exp() * scaled).sum(-1)[places], rtol=1e-5, atol=1e-5
    )
    assert not logp[~places].any()
    losses = model.loss(packed, targets, "none")
    raw, _ = model.log_probs(packed, targets)
    torch.testing.assert_close(losses, -raw)


# Fresh models


def test_a_seed_decides_every_weight_and_nothing_else_does() -> None:
    config = config_of("llama")
    one, same, other = (initialize(config, seed=seed) for seed in (3, 3, 4))
    deeper = initialize(config_of("mistral window"), seed=3)
    for (name, p), q, r, d in zip(
        one.named_parameters(), same.parameters(), other.parameters(), deeper.parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(p, q), name
        assert p.dim() == 1 or not torch.equal(p, r), name
        assert torch.equal(p, d), name  # one generator a tensor, seeded by its name
        assert p.requires_grad and p.dtype == torch.bfloat16 and p.is_contiguous()


def test_deviations_follow_width_and_depth() -> None:
    config = SIZES["random-135m"]
    model = initialize(config, dtype=torch.float32, max_positions=64)
    layer = model.model.layers[3]
    inner = (0.4 / config.hidden_size) ** 0.5
    outer = inner / (2 * config.num_hidden_layers) ** 0.5
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(inner, rel=0.01)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(inner, rel=0.01)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(outer, rel=0.01)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(outer, rel=0.01)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(config.hidden_size))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.rope_cos.shape[0] == 64


def test_a_fresh_models_loss_is_near_that_of_guessing() -> None:
    for case in CONFIGS:
        model, (documents, targets) = initialize(config_of(case)), batch_of(random_documents((64,)))
        loss = model.loss(documents, targets, "mean").item()
        assert loss == pytest.approx(torch.tensor(96.0).log().item(), abs=0.5), case


def test_dtypes_and_devices_are_checked() -> None:
    with pytest.raises(ValueError, match="dtype"):
        initialize(config_of("llama"), dtype=torch.float16)
    with pytest.raises(ValueError, match="device"):
        initialize(config_of("llama"), device="tpu")
    with pytest.raises(ValueError, match="documents"):
        Documents.pack([])
    with pytest.raises(ValueError, match="documents"):
        Documents.pack([[1], []])


# From files


@pytest.mark.parametrize("case", ["llama", "qwen3 tied", "deepseek v3"])
def test_a_saved_model_is_loaded_with_its_bits_and_trains_on(case: str, tmp_path: Path) -> None:
    model = model_of(case, torch.bfloat16)
    save_pretrained(model, tmp_path / "saved")
    loaded = load_trainable(tmp_path / "saved")
    for (name, p), (other, q) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(p, q) and q.requires_grad and q.dtype == p.dtype, name
        assert q.grad_dtype == torch.float32
    documents = random_documents(LENGTHS)
    found, wanted = _gradients(loaded, documents), _gradients(model, documents)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    served = load_model(tmp_path / "saved")
    packed = Documents.pack(documents)
    with torch.no_grad():
        assert torch.equal(served.train_hidden(packed), loaded.train_hidden(packed))


def test_float32_can_be_asked_for(tmp_path: Path) -> None:
    save_pretrained(model_of("llama", torch.bfloat16), tmp_path / "saved")
    model = load_trainable(tmp_path / "saved", dtype="float32")
    assert model.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("format", ["q4_0", "q8_0"])
def test_a_quantized_file_is_a_frozen_base(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastllm.testing import random_model

    small = random_model.model_config(1, 64, 128, 1, 1, 256)
    monkeypatch.setitem(random_model.SIZES, "random-tiny", small)
    monkeypatch.setattr(random_model.tempfile, "gettempdir", lambda: str(tmp_path))
    model = load_trainable(random_model.model_path(f"random-tiny-{format}"))
    assert model.activation == "bf16" and model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.packed.format == format
