"""Models quantized as they are loaded: one weight at a time, the same bits in every use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastllm
from fastllm import LLM, SamplingParams
from fastllm.models.loader import load_model
from fastllm.models.trainable import load_trainable
from fastllm.models.weights import SafetensorsWeights
from fastllm.nn.batch import Documents
from fastllm.nn.lora import LoraConfig, add_lora, lora_parameters
from fastllm.ops.log_probs import log_probs
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.quantize.quantizer import Quantizer
from fastllm.quantize.rule import FallbackWarning, QuantRule
from fastllm.testing.quantized_models import directory
from fastllm.testing.small_models import batch_of, random_documents

FORMATS = tuple(name for name, format in QUANT_FORMATS.items() if not format.dense)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, detokenize=False, logprobs=0)
PROMPT = [(31 * i + i * i) % 96 for i in range(20)]
SPARSE = ("mixtral", "qwen3 moe", "deepseek v3 experts")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_of(case)`: a Hugging Face directory of random weights."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = directory(case, tmp_path_factory.mktemp("wide") / "model")
        return made[case]

    return get


def generated(llm: LLM) -> tuple[list[int], list[float]]:
    out = llm.generate([PROMPT], GREEDY)[0].outputs[0]
    assert out.logprobs is not None
    return out.token_ids, [e[t].logprob for t, e in zip(out.token_ids, out.logprobs, strict=True)]


def fill_b(model: nn.Module) -> None:
    """Give an adapter that has just been made something to say."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)


@pytest.mark.parametrize(
    ("case", "format"),
    [("llama", format) for format in FORMATS] + [("qwen3 moe", "nf4"), ("mixtral", "q4_k")],
)
def test_generation_has_the_bits_of_training_in_every_format(
    case: str, format: str, model_of: Callable[[str], Path]
) -> None:
    model = load_trainable(model_of(case), quantization=format)
    assert model.activation == "bf16" and not any(p.requires_grad for p in model.parameters())
    add_lora(model, LoraConfig(r=4, target_modules=("q_proj", "o_proj")))
    fill_b(model)
    ids, found = generated(LLM.from_model(model))
    targets = torch.tensor([-100] * (len(PROMPT) - 1) + ids)
    documents = Documents.pack([[*PROMPT, *ids[:-1]]])
    trained, _ = model.log_probs(documents, targets)
    assert trained.requires_grad
    assert trained[len(PROMPT) - 1 :].tolist() == found
    alone, _ = model.log_probs(Documents.pack([PROMPT[:7]]), torch.tensor(PROMPT[1:8]))
    among, _ = model.log_probs(
        Documents.pack([PROMPT[:7], PROMPT]), torch.tensor([*PROMPT[1:8], *PROMPT])
    )
    assert torch.equal(alone, among[:7])


@pytest.mark.parametrize("case", ["llama", *SPARSE])
def test_adapters_alone_are_trained_and_the_loss_falls(
    case: str, model_of: Callable[[str], Path]
) -> None:
    model = load_trainable(model_of(case), quantization="nf4")
    served = [t for t in model.served_tensors() if not t.requires_grad]
    before = [t.clone() for t in served]
    experts = [m for m in model.modules() if type(m).__name__ == "Experts"]
    assert bool(experts) == (case in SPARSE)
    for layer in experts:
        assert {packed.format for packed in layer.packs()} == {"nf4"}
        assert layer.gate_up_proj is layer.down_proj is None
    parameters = add_lora(model, LoraConfig(r=8, target_modules="all-linear"))
    batch, losses = batch_of(random_documents((12, 20))), []
    for _ in range(3):
        loss = model.loss(*batch, "mean")
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in parameters:
                assert p.grad is not None and p.grad.isfinite().all()
                p.sub_((0.001 * p.grad.sign()).to(p.dtype))
                p.grad = None
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(served, before, strict=True))


@pytest.mark.parametrize("case", ["llama", "qwen3 moe"])
def test_loading_gives_the_bits_of_quantizing_in_memory(
    case: str, model_of: Callable[[str], Path]
) -> None:
    loaded = load_trainable(model_of(case), quantization="q8_0")
    changed = load_trainable(model_of(case))
    report = fastllm.quantize_model(changed, "q8_0")
    batch = batch_of(random_documents((9, 12)))
    assert torch.equal(loaded.log_probs(*batch)[0], changed.log_probs(*batch)[0])
    theirs = loaded.quantization
    assert theirs is not None
    assert {x.name: x for x in theirs.layers} == {x.name: x for x in report.layers}
    assert theirs.bytes_before == report.bytes_before
    assert theirs.bytes_after == loaded.nbytes < 0.7 * theirs.bytes_before


def test_weights_are_read_one_by_one(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, most = [0], [0]
    pack, release = Quantizer.pack, SafetensorsWeights.release

    def watched(self: Any, name: str, weight: torch.Tensor, *args: Any) -> Any:
        held[0] += weight.nbytes
        most[0] = max(most[0], held[0])
        return pack(self, name, weight, *args)

    def released(self: Any, name: str | None = None) -> None:
        held[0] = 0
        release(self, name)

    monkeypatch.setattr(Quantizer, "pack", watched)
    monkeypatch.setattr(SafetensorsWeights, "release", released)
    model = load_model(model_of("llama"), quantization="q4_0")
    assert model.quantization is not None
    assert 0 < most[0] <= 2 * 256 * 512 * 2  # gate and up, which are one product


def test_an_engine_quantizes_as_it_loads_and_says_what_did_not_fit(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = model_of("llama")
    llm = LLM(path, quantization="int4", max_model_len=64)
    assert llm.model.activation == "int8"
    assert llm.model.quantization is not None and llm.model.quantization.format == "int4_g128"
    assert len(generated(llm)[0]) == 6
    fp32 = LLM(path, dtype="float32", activation="fp32", quantization="int4", max_model_len=64)
    prompt = llm.logits(PROMPT) - fp32.logits(PROMPT)
    assert prompt.abs().max() < 0.1 * fp32.logits(PROMPT).abs().max()
    narrow = directory("llama", tmp_path / "narrow", hidden_size=64, intermediate_size=256)
    with pytest.warns(FallbackWarning, match=r"10 of 14 weights are q5_0, not q4_k: rows of 64"):
        model = load_model(narrow, quantization="q4_k")
    assert model.quantization is not None
    assert {x.format for x in model.quantization.layers} == {"q4_k", "q5_0"}
    with pytest.raises(ValueError, match="did you mean"):
        LLM(path, quantization="int44")
    with pytest.raises(ValueError, match=r"no layer of .* is quantized to q8_0"):
        load_model(path, quantization=QuantRule("q8_0", modules="nothing"))


def test_a_mix_raises_what_matters_more(model_of: Callable[[str], Path]) -> None:
    model = load_model(model_of("llama"), quantization="q4_k_m")
    assert model.quantization is not None and model.quantization.format == "q4_k_m"
    formats = {layer.name: layer.format for layer in model.quantization.layers}
    assert formats["model.layers.1.mlp.down_proj"] == "q6_k"
    assert formats["model.layers.1.self_attn.v_proj"] == "q6_k"
    assert formats["model.layers.1.mlp.up_proj"] == "q4_k"
    assert model.model.layers[1].self_attn.qkv.packed is None  # v is no part of one product
    assert len(generated(LLM.from_model(model, max_model_len=64))[0]) == 6


def test_quantized_files_are_rounded_again_only_if_asked(
    random_model: Callable[[str], Path],
) -> None:
    path = random_model("q8_0")
    assert load_model(path).quantization is None
    again = load_model(path, quantization="q4_0", activation="bf16")
    layers = again.model.layers
    assert layers[0].self_attn.qkv.packed is not None
    assert layers[0].self_attn.qkv.packed.format == "q4_0"
    embedding = again.model.embed_tokens.packed
    assert (
        embedding is not None and embedding.format == "q8_0" and again.lm_head.packed is embedding
    )
    assert again.quantization is not None and 1e-3 < (again.quantization.error or 0) < 2e-2


def test_an_adapter_is_served_in_the_arithmetic_that_it_was_trained_in(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from fastllm.models.adapters import save_adapter

    path = model_of("llama")
    model = load_trainable(path, quantization="q4_1")
    add_lora(model, LoraConfig(r=4, target_modules="all-linear"))
    fill_b(model)
    save_adapter(model, tmp_path)
    trained = generated(LLM.from_model(model, max_model_len=64))
    served = LLM(path, adapter=tmp_path, quantization="q4_1", max_model_len=64)
    assert served.model.activation == "bf16" and generated(served) == trained
    other = LLM(path, adapter=tmp_path, quantization="q8_0", max_model_len=64)
    assert generated(other)[1] != trained[1]
    forced = log_probs(served.logits(PROMPT)[-1:], torch.tensor([[trained[0][0]]]))
    assert forced.item() == trained[1][0]
