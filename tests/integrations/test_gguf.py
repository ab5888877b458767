"""load_gguf: a GGUF file as a transformers model, with the same bits as the engine's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import inputs, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import fastllm
from fastllm.errors import ModelFileError, ModelNotFoundError
from fastllm.integrations.transformers.gguf import gguf_tokenizer, load_gguf
from fastllm.integrations.transformers.quant_linear import QuantExperts
from fastllm.models.gguf_export import export_gguf, weights_of
from fastllm.models.loader import load_model
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.weights import open_weights
from fastllm.nn import QuantLinear
from fastllm.nn.quant_embedding import QuantEmbedding
from fastllm.quantize.packed import unpack

FAMILIES = ("llama", "smollm", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
pytestmark = pytest.mark.usefixtures("one_quiet_thread")
IDS = inputs((12, 12))["input_ids"]


def written(family: str, folder: Path, type: str = "q8_0", tokenizer: Any = None) -> Path:
    changes = {"num_key_value_heads": 4} if family == "olmoe" else {}
    tiny(family, torch.float32, **changes).save_pretrained(folder / "plain")
    file = folder / f"{family}.gguf"
    export_gguf(weights_of(open_weights(folder / "plain")), file, type, tokenizer)
    return file


def share(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_gives_the_engines_logits_and_tokens(
    family: str, tmp_path: Path
) -> None:
    file = written(family, tmp_path)
    model = load_gguf(file, dtype="float32", activation="fp32")
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    assert model.is_quantized and not model.training
    assert any(isinstance(m, QuantExperts) for m in model.modules()) == (family in MIXTURES)
    llm = fastllm.LLM(file, dtype="float32", activation="fp32", max_model_len=64)
    with torch.no_grad():
        theirs = model(IDS[:1]).logits[0]
    assert share(theirs, llm.logits(IDS[0].tolist())) < 1e-5
    answer = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    wanted = llm.generate(
        [IDS[0].tolist()],
        fastllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False),
    )
    assert answer[0, IDS.shape[1] :].tolist() == list(wanted[0].outputs[0].token_ids)


@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q8_0"])
def test_blocks_stay_packed_with_the_bits_of_the_engine(type: str, tmp_path: Path) -> None:
    file = written("smollm", tmp_path, type)
    model, engine = load_gguf(file), load_model(file)
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, QuantEmbedding) and isinstance(head, QuantLinear)
    assert head.weight_codes is table.weight_codes
    layer = model.model.layers[1]
    group = engine.model.layers[1].self_attn.qkv.packed
    mine = [unpack(m.packed_weight()) for m in
            (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]  # fmt: skip
    assert torch.equal(torch.cat(mine), unpack(group))
    down = layer.mlp.down_proj
    assert down.format == type and down.activation == "int8"
    assert torch.equal(down.packed_weight().data, engine.model.layers[1].mlp.down_proj.packed.data)
    assert model.get_memory_footprint() < 1.3 * file.stat().st_size
    plain = load_gguf(file, packed_embeddings=False)
    assert type_of(plain.lm_head) is nn.Linear
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def type_of(module: nn.Module) -> type:
    return type(module)


def test_it_is_saved_as_safetensors_trained_and_dequantized(tmp_path: Path) -> None:
    file = written("qwen3_moe", tmp_path)
    model = load_gguf(file, dtype=torch.float32, activation="fp32")
    with torch.no_grad():
        wanted = model(IDS).logits
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, wanted)
        values = again.dequantize()
        assert share(values(IDS).logits, wanted) < 1e-5
    given = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=given).logits.square().mean().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0


@pytest.mark.parametrize("type", ["bf16", "f16"])
def test_a_file_of_numbers_gives_a_plain_model(type: str, tmp_path: Path) -> None:
    model = load_gguf(written("llama", tmp_path, type))
    assert not getattr(model, "is_quantized", False)
    assert type_of(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="activation 'int8' needs quantized weights"):
        load_gguf(tmp_path / "llama.gguf", activation="int8")


def test_the_tokenizer_comes_out_of_the_file(tmp_path: Path) -> None:
    own = train_tokenizer(
        ["Hello there, general.", "some more text, generally"], 300, allow_smaller=True
    )
    tiny("llama", vocab_size=own.vocab_size).save_pretrained(tmp_path / "plain")
    file = tmp_path / "model.gguf"
    export_gguf(weights_of(open_weights(tmp_path / "plain")), file, "q8_0", own)
    tokenizer = gguf_tokenizer(file)
    text = "Hello there, general."
    assert tokenizer(text).input_ids == own.encode(text)
    ids = tokenizer(text, return_tensors="pt").input_ids
    made = load_gguf(file).generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert isinstance(tokenizer.decode(made[0]), str)


def test_bad_files_and_arguments_are_named(tmp_path: Path) -> None:
    file = written("llama", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"llama\.ggu'? not found|did you mean"):
        load_gguf(str(file)[:-1])
    with pytest.raises(ModelFileError, match=r"is a directory, not a GGUF file.*from_pretrained"):
        load_gguf(tmp_path / "plain")
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16'"):
        load_gguf(file, dtype=torch.float16)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'mps'"):
        load_gguf(file, device="mps")
    with pytest.raises(ValueError, match="activation must be one of"):
        load_gguf(file, activation="int4")
    data = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match=r"cut\.gguf.*(truncated|ends at)"):
        load_gguf(cut)
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama",
                                   b"\x05\x00\x00\x00\x00\x00\x00\x00mamba"))  # fmt: skip
    with pytest.raises(ModelFileError, match=r"'mamba' is not supported.*Supported: llama"):
        load_gguf(other)
    plain = tmp_path / "no.gguf"
    plain.write_bytes(b"not a model of any kind, but text")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        load_gguf(plain)


def test_adapters_go_on_a_gguf_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(
            load_gguf(written("smollm", tmp_path)),
            peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )
    model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 8 and all(g is not None for g in grads)
