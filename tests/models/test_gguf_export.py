"""Exported files: llama.cpp and transformers answer as fastllm does on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from exported_models import TEMPLATE, TEXT, same_greedy, save_model, small_config, small_tokenizer

from fastllm import LLM
from fastllm.cli.main import main
from fastllm.errors import ModelFileError
from fastllm.models.adapters import read_adapter, save_adapter
from fastllm.models.gguf import GGUFFile
from fastllm.models.gguf_export import export_gguf, export_hf, weights_of
from fastllm.models.gguf_writer import write_gguf
from fastllm.models.loader import load_model
from fastllm.models.rope_scaling import RopeConfig
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_gguf import PRE_TOKENIZERS
from fastllm.models.tokenizer_to_gguf import tokenizer_metadata
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize, load_trainable
from fastllm.models.weights import open_weights
from fastllm.nn.batch import Documents
from fastllm.nn.lora import LoraConfig, add_lora, lora_parameters

PROMPT = "The dog sat on 12 shells"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A Hugging Face directory: architecture llama, its head not tied to its embedding."""
    folder = tmp_path_factory.mktemp("export") / "llama"
    return save_model(folder, small_config("llama", tokenizer.vocab_size), tokenizer)


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0"])
def test_llama_cpp_gives_the_same_greedy_tokens(
    type: str, llama: Path, tokenizer: Tokenizer, llama_cpp: Any, tmp_path: Path
) -> None:
    same_greedy(llama_cpp, llama, tmp_path / f"{type}.gguf", type, tokenizer)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama3-rope", "tied"])
def test_llama_cpp_gives_the_same_greedy_tokens_of_other_models(
    kind: str, tokenizer: Tokenizer, llama_cpp: Any, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {}
    if kind == "llama3-rope":
        fields["rope"] = RopeConfig(
            type="llama3", theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )  # fmt: skip
    model_type = kind if kind.startswith("qwen") else "llama"
    fields["tie_word_embeddings"] = kind in ("tied", "qwen2")
    config = small_config(model_type, tokenizer.vocab_size, **fields)
    folder = save_model(tmp_path / "model", config, tokenizer)
    same_greedy(llama_cpp, folder, tmp_path / "model.gguf", "bf16", tokenizer)


def test_llama_cpp_cuts_text_as_the_tokenizer_does(
    llama: Path, tokenizer: Tokenizer, llama_cpp: Any, tmp_path: Path
) -> None:
    export_gguf(weights_of(open_weights(llama)), tmp_path / "m.gguf", "q8_0", tokenizer)
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in (*TEXT, PROMPT, "<|im_start|>user\nWer? 1 <tool> 22\n\n  x<|im_end|>"):
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        assert ids == tokenizer.encode(text)
        assert model.detokenize(ids, special=True).decode() == text
    assert model.token_eos() == tokenizer.eos_token_id
    assert model.metadata["tokenizer.chat_template"] == TEMPLATE
    model.close()


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "stablelm2"])
def test_a_tokenizer_comes_back_from_its_metadata(pre: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(pre)
    if PRE_TOKENIZERS[pre].ignore_merges:
        parts = json.loads(tokenizer.to_json())
        parts["model"]["ignore_merges"] = True
        tokenizer = Tokenizer(
            tokenizers.Tokenizer.from_str(json.dumps(parts)),
            special_tokens=tokenizer.special_tokens,
            chat_template=TEMPLATE,
        )
    write_gguf(tmp_path / "t.gguf", tokenizer_metadata(tokenizer, tokenizer.vocab_size, (1,)), {})
    back = Tokenizer.from_gguf(GGUFFile.open(tmp_path / "t.gguf").metadata)
    for text in (*TEXT, "<|im_start|>a <tool> 123456  \n"):
        assert back.encode(text) == tokenizer.encode(text)
        assert back.decode(back.encode(text), False) == text
    assert back.special_tokens == tokenizer.special_tokens
    assert back.eos_token_ids == {2, 1}
    assert back.chat_template == TEMPLATE


def test_a_tokenizer_trained_here_has_a_gguf_form(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXT * 3, 320)
    write_gguf(tmp_path / "t.gguf", tokenizer_metadata(tokenizer, 320), {})
    back = Tokenizer.from_gguf(GGUFFile.open(tmp_path / "t.gguf").metadata)
    for text in (*TEXT, "e\u0301 is not normalized"):
        assert back.encode(text) == tokenizer.encode(text)
        assert back.decode(back.encode(text)) == text
    assert (back.eos_token_ids, back.chat_template) == (
        tokenizer.eos_token_ids, tokenizer.chat_template,
    )  # fmt: skip


def test_what_the_format_cannot_say_is_refused(tokenizer: Tokenizer) -> None:
    parts = json.loads(tokenizer.to_json())
    cases = [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "has no name in GGUF"),
    ]
    for change, message in cases:
        other = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parts | change)))
        with pytest.raises(ValueError, match=message):
            tokenizer_metadata(other, 400)
    with pytest.raises(ValueError, match="belongs to another model"):
        tokenizer_metadata(tokenizer, 300)
    word = json.loads(tokenizer.to_json())
    word["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    word["added_tokens"] = []
    word = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(word)))
    with pytest.raises(ValueError, match="only byte-level BPE"):
        tokenizer_metadata(word, 300)


def test_a_file_of_the_wanted_type_is_copied_bit_for_bit(
    llama: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    export_gguf(weights_of(open_weights(llama)), first, "q4_0", tokenizer)
    export_gguf(weights_of(open_weights(first)), second, "q4_0", tokenizer)
    mine, again = GGUFFile.open(first), GGUFFile.open(second)
    assert mine.tensors.keys() == again.tensors.keys()
    for name, tensor in mine.tensors.items():
        assert torch.equal(tensor.data, again.tensors[name].data), name
    with pytest.raises(FileExistsError):
        export_gguf(weights_of(open_weights(llama)), first, "q4_0", tokenizer)


def _train_adapter(path: Path, folder: Path) -> torch.Tensor:
    """A random adapter of the model, saved; returns the adapted model's logits in float32."""
    model = load_trainable(path, dtype="float32")
    add_lora(model, LoraConfig(r=4, target_modules=("q_proj", "v_proj", "up_proj")))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
        save_adapter(model, folder, str(path))
        return model.logits(model.train_hidden(Documents.pack([list(range(9))])))


@pytest.mark.parametrize("kind", ["directory", "packed"])
def test_export_merges_an_adapter(
    kind: str, llama: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = llama
    if kind == "packed":
        path = tmp_path / "base.gguf"
        export_gguf(weights_of(open_weights(llama)), path, "q8_0", tokenizer)
    wanted = _train_adapter(path, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    export_gguf(weights_of(open_weights(path), adapter), tmp_path / "m.gguf", "f32", tokenizer)
    export_hf(weights_of(open_weights(path), adapter), tmp_path / "m", "f32", tokenizer)
    for merged in (tmp_path / "m.gguf", tmp_path / "m"):
        logits = LLM(merged, dtype="float32").logits(list(range(9)))
        assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    moved = {name.replace("up_proj", "down_proj"): v for name, v in adapter.factors.items()}
    with pytest.raises(ModelFileError, match=r"down_proj: was made for a layer"):
        weights_of(open_weights(path), replace(adapter, factors=moved))


@pytest.mark.parametrize("packed", [False, True])
def test_a_live_model_is_exported_with_its_adapter(
    packed: bool, llama: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = llama
    if packed:
        path = tmp_path / "base.gguf"
        export_gguf(weights_of(open_weights(llama)), path, "q8_0", tokenizer)
    model = load_trainable(path, dtype="float32")
    add_lora(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
        wanted = model.logits(model.train_hidden(Documents.pack([list(range(9))])))
    export_gguf(weights_of(model), tmp_path / "m.gguf", "f32", tokenizer)
    logits = LLM(tmp_path / "m.gguf", dtype="float32").logits(list(range(9)))
    assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_transformers_gives_equal_logits_of_an_exported_directory(
    llama: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    export_gguf(weights_of(open_weights(llama)), tmp_path / "m.gguf", "q4_0", tokenizer)
    export_hf(weights_of(open_weights(tmp_path / "m.gguf")), tmp_path / "m", "f32", tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = tokenizer.encode(PROMPT)
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits[0]
    mine = LLM(tmp_path / "m.gguf", activation="fp32").logits(ids)
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert ours(PROMPT)["input_ids"] == ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"attention_bias": False}, "attention_bias"),
     ({"sliding_window": (8, None)}, "sliding_window"),
     ({"rope": RopeConfig(type="dynamic", factor=2.0)}, "dynamic")],
)  # fmt: skip
def test_a_model_that_the_format_cannot_express_is_named(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = replace(small_config("qwen2", 300), **fields)
    model = initialize(config, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        export_gguf(weights_of(model), tmp_path / "m.gguf", "bf16", None)
    assert not list(tmp_path.iterdir())


def test_values_that_the_type_cannot_hold_are_named(tmp_path: Path) -> None:
    model = initialize(small_config("llama", 300), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 7e4
    with pytest.raises(ValueError, match=r"up_proj.*too large for f16"):
        export_gguf(weights_of(model), tmp_path / "m.gguf", "f16", None)
    assert not list(tmp_path.iterdir())


def test_the_command_exports_and_says_what_it_cannot(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _train_adapter(llama, tmp_path / "adapter")
    out = tmp_path / "m.gguf"
    words = ["export", str(llama), "--adapter", str(tmp_path / "adapter"), "--type", "q8_0"]
    assert main([*words, "--out", str(out)]) == 0
    model = load_model(out, activation="fp32")
    assert model.config.num_hidden_layers == 2
    assert main([*words, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*words, "--format", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "quantized formats go to GGUF" in capsys.readouterr().err
    words = ["export", str(out), "--format", "hf", "--out", str(tmp_path / "hf")]
    assert main(words) == 0
    assert load_model(tmp_path / "hf").dtype == torch.bfloat16
